"""What the attacks on text share."""
