"""What is known of images before any gradient: regularisers, coordinates, batch statistics."""
