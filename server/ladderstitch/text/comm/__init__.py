"""Communicators, which sum tensors over ranks: shared memory, TCP, NCCL, Triton kernels."""
