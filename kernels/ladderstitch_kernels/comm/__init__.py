"""Communication from within kernels: memory that all ranks map, signals, and reductions."""
