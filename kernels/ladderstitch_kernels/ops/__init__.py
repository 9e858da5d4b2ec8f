"""Kernels that one rank runs by itself."""
