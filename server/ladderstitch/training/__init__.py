"""Making model families: vision and language models."""
