"""Which models can be shared and inverted: each against plain double backward."""
