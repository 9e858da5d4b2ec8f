"""Conversion of language models to ladders, and training of small ones."""
