"""Symmetric memory: memory of the same shape on every rank that all ranks' kernels can write.

Kernels get the memory of all ranks as an int64 table of addresses. Where the memory is located does
not matter to them:

    SharedMapping   a file that the processes of one machine map; for the interpreter on a CPU
    StreamRanks     ranks that are streams of one process, on one GPU, or (`pinned`) with the
                    memory in pinned host memory, so that every byte crosses the PCIe bus
    PeerMemory      torch symmetric memory: the GPUs of one machine, one process each
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SymmetricTensor:
    """The part of one rank, and the addresses of the parts of all ranks."""

    local: Tensor
    addresses: Tensor
    """[R] int64, on the device whose kernels read it: the address of each rank's part."""


class SymmetricMemory(Protocol):
    """A collective allocator: every rank requests the same shapes in the same order."""

    rank: int
    ranks: int

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> SymmetricTensor:
        """Return zeroed memory that stays valid as long as its local tensor exists."""


class SharedMapping:
    """Memory of the processes of one machine, in files of `folder` that all of them map.

    The caller makes and removes the folder, preferably in a memory file system. The files may be
    removed as soon as all ranks have allocated, because mappings outlive their names.
    """

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._folder = folder
        self._allocations = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> SymmetricTensor:
        """Return zeroed memory; the addresses are those of this process's mapping.

        Raises `OSError` if the folder has no room; a write to a page without room would end the
        process.
        """
        elements = math.prod(shape)
        stride = -(-elements * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        path, size = self._folder / f"symmetric-{self._allocations}", stride * self.ranks
        self._allocations += 1
        try:
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            needed = f"expected room for {size / 2**20:.1f} MiB: {error.strerror}"
            raise OSError(error.errno, needed, str(self._folder)) from error
        mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        base = mapped.data_ptr()
        start = self.rank * stride
        local = mapped[start : start + elements * dtype.itemsize].view(dtype).view(*shape)
        addresses = torch.tensor([base + rank * stride for rank in range(self.ranks)])
        return SymmetricTensor(local, addresses)


class StreamRanks:
    """Memory of one of several ranks in this process; `StreamRanks.group` makes all of them."""

    def __init__(
        self, rank: int, ranks: int, device: torch.device, pinned: bool, shared: list[list[Tensor]]
    ) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self._pinned, self._shared = pinned, shared
        self._allocations = 0

    @classmethod
    def group(
        cls, ranks: int, device: torch.device | str, *, pinned: bool = False
    ) -> list[StreamRanks]:
        """Return the memories of all ranks, in order; `pinned` allocates pinned host memory."""
        shared: list[list[Tensor]] = []
        return [cls(rank, ranks, torch.device(device), pinned, shared) for rank in range(ranks)]

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> SymmetricTensor:
        """Return zeroed memory; the first rank to request it allocates for all."""
        if self._allocations == len(self._shared):
            self._shared.append([self._allocate(shape, dtype) for _ in range(self.ranks)])
        parts = self._shared[self._allocations]
        self._allocations += 1
        addresses = torch.tensor([part.data_ptr() for part in parts], device=self.device)
        return SymmetricTensor(parts[self.rank], addresses)

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._pinned:
            return torch.zeros(*shape, dtype=dtype, pin_memory=True)
        return torch.zeros(*shape, dtype=dtype, device=self.device)


class PeerMemory:
    """Memory of the GPUs of one machine with peer access, under `torch.distributed`.

    Each rank is a process. Two ranks on one GPU need TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1.
    The GPU then runs them in turn, which is correct for checks but useless for timing.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.rank, self.ranks, self.device = group.rank(), group.size(), device
        self._group = group

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> SymmetricTensor:
        """Return zeroed memory, after a rendezvous and a barrier of all ranks."""
        import torch.distributed._symmetric_memory as symmetric

        local = symmetric.empty(*shape, dtype=dtype, device=self.device)
        handle = symmetric.rendezvous(local, self._group)
        local.zero_()
        handle.barrier()
        addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=self.device)
        return SymmetricTensor(local, addresses)
