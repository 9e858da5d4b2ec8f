"""Making language models: ladders out of standard checkpoints, and small ones from scratch."""
