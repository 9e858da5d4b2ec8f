"""The ranks of one language model as one device."""
