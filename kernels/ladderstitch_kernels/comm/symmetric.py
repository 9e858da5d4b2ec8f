"""Memory of the same shape on every rank, which every rank's kernels can write: the one seam to it.

Kernels get a peer's memory as a row of an int64 table of addresses. Where the memory lies is data:

    SharedMapping   a file that the processes of one machine map; for the interpreter on a CPU
    StreamRanks     ranks that are streams of one process, on one GPU, or (`pinned`) with the
                    memory in pinned host memory, so that every byte crosses the PCIe bus
    PeerMemory      torch symmetric memory: the GPUs of one machine, one process each
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SymmetricTensor:
    """One rank's part, and where the parts of all ranks are."""

    local: Tensor
    addresses: Tensor
    """[R] int64, on the device whose kernels read it: the address of each rank's part."""


class SymmetricMemory(Protocol):
    """Allocates together: every rank asks for the same shapes in the same order."""

    rank: int
    ranks: int

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> SymmetricTensor:
        """Zeroed memory that lives as long as its local tensor."""


class SharedMapping:
    """Parts in files of `folder`, which the caller makes and removes; best in a memory file system.

    The files may go as soon as all ranks have allocated: mappings outlive their names.
    """

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._folder = folder
        self._allocations = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> SymmetricTensor:
        elements = math.prod(shape)
        stride = -(-elements * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        path = self._folder / f"symmetric-{self._allocations}"
        self._allocations += 1
        mapped = torch.from_file(
            str(path), shared=True, size=stride * self.ranks, dtype=torch.uint8
        )
        base = mapped.data_ptr()
        start = self.rank * stride
        local = mapped[start : start + elements * dtype.itemsize].view(dtype).view(*shape)
        addresses = torch.tensor([base + rank * stride for rank in range(self.ranks)])
        return SymmetricTensor(local, addresses)


class StreamRanks:
    """One rank of several in this process; `StreamRanks.group` makes them all."""

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
        """The ranks of one process, in order; `pinned` puts the memory on the host."""
        shared: list[list[Tensor]] = []
        return [cls(rank, ranks, torch.device(device), pinned, shared) for rank in range(ranks)]

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> SymmetricTensor:
        if self._allocations == len(self._shared):
            self._shared.append([self._part(shape, dtype) for _ in range(self.ranks)])
        parts = self._shared[self._allocations]
        self._allocations += 1
        addresses = torch.tensor([part.data_ptr() for part in parts], device=self.device)
        return SymmetricTensor(parts[self.rank], addresses)

    def _part(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._pinned:
            return torch.zeros(*shape, dtype=dtype, pin_memory=True)
        return torch.zeros(*shape, dtype=dtype, device=self.device)


class PeerMemory:
    """GPUs of one machine under `torch.distributed`, one process each, peer access between them.

    Two ranks on one GPU need TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1; the GPU then runs them in
    turns, which is right for checking and useless for timing.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.rank, self.ranks, self.device = group.rank(), group.size(), device
        self._group = group

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> SymmetricTensor:
        import torch.distributed._symmetric_memory as symmetric

        local = symmetric.empty(*shape, dtype=dtype, device=self.device)
        handle = symmetric.rendezvous(local, self._group)
        local.zero_()
        handle.barrier()
        addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=self.device)
        return SymmetricTensor(local, addresses)
