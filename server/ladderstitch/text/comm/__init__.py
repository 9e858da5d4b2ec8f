"""Communicators, which sum tensors over ranks: shared memory, TCP, NCCL, Triton kernels."""

from typing import Literal

CommKind = Literal["shared_memory", "tcp", "nccl", "symmetric"]
CommChoice = Literal["auto", CommKind]
"""The values of the option `link`."""
