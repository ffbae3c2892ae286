"""What one site's own update gives away: inversion of the update, references, leakage."""
