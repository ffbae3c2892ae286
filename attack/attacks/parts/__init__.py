"""What several exact attacks share."""
