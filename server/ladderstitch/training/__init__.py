"""Training and conversion of model families, for images and for text."""
