"""The communicator of Triton kernels, which store directly into the memory of other ranks.

Partials of few rows (decoding) use the split-phase kernels, which also do the product before and
the residual add and norm after the reduction. Partials of more rows (prefill) use an all-reduce
that is complete when `all_reduce_async` returns. On GPUs the memory is torch's symmetric memory. On
a CPU, in Triton's interpreter, it is a shared mapping.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.comm.base import PeerLost, Work
from ladderstitch_kernels import (
    AllReduce,
    Exchange,
    PeerMemory,
    SharedMapping,
    SymmetricMemory,
    add_rms_norm,
    gemv_post,
    post,
    wait_add_norm,
    wait_sum,
)
from ladderstitch_kernels.launch import interpreted

FOLDER = Path("/dev/shm")
ABORT_FLAG = "abort"
SPLIT_PHASE_ROWS = 16
"""Largest number of rows of a partial that uses the split-phase kernels."""

ABORT_POLL_S = 0.02
RENDEZVOUS_TIMEOUT = timedelta(seconds=60)


class SymmetricRegion:
    """The folder of one group in /dev/shm: its abort flag and, on a CPU, the mappings."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ladderstitch-", dir=FOLDER))
        flag = self.path / ABORT_FLAG
        flag.write_bytes(bytes(mmap.PAGESIZE))
        self._flag = _map_page(flag)

    def abort(self) -> None:
        """Make every current and later `wait` of the group raise `PeerLost`."""
        self._flag[0] = 1

    def unlink(self) -> None:
        """Remove the files; the memory is freed when its last user unmaps it."""
        shutil.rmtree(self.path, ignore_errors=True)


def _map_page(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), mmap.PAGESIZE)


def open_symmetric_memory(
    path: Path, store: tuple[str, int], rank: int, ranks: int, device: torch.device
) -> SymmetricMemory:
    """Return memory that all ranks can write, once all ranks have called this function.

    Raises `ConfigError` if the kernels cannot run on this device.
    """
    if device.type == "cuda":
        import torch.distributed as dist

        torch.cuda.set_device(rank % torch.cuda.device_count())
        method = f"tcp://{store[0]}:{store[1]}"
        dist.init_process_group(
            "nccl", init_method=method, rank=rank, world_size=ranks, timeout=RENDEZVOUS_TIMEOUT
        )
        return PeerMemory(dist.group.WORLD, device)
    if not interpreted():
        raise ConfigError(
            "link: symmetric needs GPUs (or TRITON_INTERPRET=1, to try it); use shared_memory"
        )
    return SharedMapping(path, rank, ranks)


class SymmetricCommunicator:
    """One rank's end of a `SymmetricRegion`, for partials of at most `rows` rows.

    A partial has at most `width` columns; each may have another number of them.
    """

    def __init__(
        self,
        memory: SymmetricMemory,
        region: Path,
        rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rank, self.ranks, self._device = memory.rank, memory.ranks, device
        self._exchange = Exchange(memory, min(rows, SPLIT_PHASE_ROWS), width, dtype, device)
        self._reduce = AllReduce(memory, rows * width, dtype, device)
        self._flag = _map_page(region / ABORT_FLAG)
        self._closed = threading.Event()
        self._watcher = threading.Thread(
            target=self._watch_flag, name="symmetric-abort", daemon=True
        )
        self._watcher.start()

    def all_reduce_async(self, partial: Tensor) -> Work:
        """Start the sum of a tensor over the ranks; complete it if it has many rows."""
        flat = partial.reshape(-1, partial.shape[-1])
        if len(flat) <= self._exchange.rows:
            post(flat, self._exchange)
            return partial.shape, None
        return partial.shape, self._reduce(flat)

    def all_reduce_product_async(self, x: Tensor, weight: Tensor) -> Work:
        """Start the sum over the ranks of x @ weight.T, for few rows in one kernel."""
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > self._exchange.rows:
            return self.all_reduce_async(F.linear(x, weight))
        gemv_post(flat, weight, self._exchange)
        return torch.Size((*x.shape[:-1], len(weight))), None

    def wait(self, work: Work) -> Tensor:
        """Return the sum; raises `PeerLost` after an abort."""
        shape, total = work
        if total is None:
            total = wait_sum(shape.numel() // shape[-1], self._exchange, shape[-1])
        self._check_aborted()
        summed: Tensor = total.view(shape)
        return summed

    def wait_add_norm(
        self, work: Work, residual: Tensor, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return r = residual + the sum, and rms_norm(r) * gain, in one kernel.

        For few rows, the kernel also waits for the sum. Raises `PeerLost` after an abort.
        """
        shape, total = work
        flat = residual.reshape(-1, shape[-1])
        if total is not None:
            whole, normed = add_rms_norm(total.view(flat.shape), flat, gain, eps)
            return whole.view(shape), normed.view(shape)
        whole, normed = wait_add_norm(flat, gain, eps, self._exchange)
        self._check_aborted()
        return whole.view(shape), normed.view(shape)

    def close(self) -> None:
        """Abort the group and, on GPUs, destroy its process group."""
        self._flag[0] = 1
        self._closed.set()
        self._watcher.join()
        if self._device.type == "cuda":
            torch.distributed.destroy_process_group()

    def _watch_flag(self) -> None:
        """Release the kernels that wait for a peer after an abort; nothing else can end them."""
        while not self._closed.wait(ABORT_POLL_S):
            if self._flag[0]:
                if self._device.type == "cuda":
                    with torch.cuda.stream(torch.cuda.Stream(self._device)):
                        self._release_kernels()
                else:
                    self._release_kernels()
                return

    def _release_kernels(self) -> None:
        self._exchange.stop()
        self._reduce.stop()

    def _check_aborted(self) -> None:
        """Raise `PeerLost` if the group was aborted.

        On a GPU the kernel has not waited yet when this runs. The group discards the results of a
        pass during which it was aborted.
        """
        if self._flag[0]:
            raise PeerLost("the group was aborted")
