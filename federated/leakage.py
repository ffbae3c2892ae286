"""How much of a site's training images its update gives away."""
