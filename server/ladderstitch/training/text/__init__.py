"""Ladder conversion and training of small language models."""
