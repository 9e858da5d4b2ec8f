"""Ranks talking to each other from within kernels: memory that all see, signals, reductions."""
