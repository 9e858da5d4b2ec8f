"""Sums over ranks: shared memory, TCP, NCCL, Triton kernels."""
