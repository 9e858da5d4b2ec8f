"""Continuous batching of many callers on one language model."""
