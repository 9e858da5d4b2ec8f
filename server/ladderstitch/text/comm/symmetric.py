"""The link whose reductions are Triton kernels: ranks store straight into each other's memory.

Few rows (decoding) go by the split-phase kernels, with the product before and the residual add and
norm after in the same kernels; more (prefill) by an all-reduce that is done when `post` returns. On
GPUs the memory is torch's symmetric memory; on a CPU, in Triton's interpreter, a shared mapping.
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
    gemv_post,
    post,
    wait_add_norm,
    wait_sum,
)
from ladderstitch_kernels.launch import interpreted

FOLDER = Path("/dev/shm")
FLAG = "stop"
SPLIT_PHASE_ROWS = 16
WATCH_S = 0.02
MEETING = timedelta(seconds=60)


class SymmetricRegion:
    """A folder of one group in memory: the flag that stops it, and on a CPU the mappings."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ladderstitch-", dir=FOLDER))
        flag = self.path / FLAG
        flag.write_bytes(bytes(mmap.PAGESIZE))
        self._flag = _map(flag)

    def abort(self) -> None:
        """Make every `wait` of the group raise `PeerLost`, now and later."""
        self._flag[0] = 1

    def forget(self) -> None:
        """Remove the names; the memory goes with its last user."""
        shutil.rmtree(self.path, ignore_errors=True)


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), mmap.PAGESIZE)


def reach_peers(
    path: Path, store: tuple[str, int], rank: int, ranks: int, device: torch.device
) -> SymmetricMemory:
    """This rank's symmetric memory; raises `ConfigError` where kernels cannot run."""
    if device.type == "cuda":
        import torch.distributed as dist

        torch.cuda.set_device(rank % torch.cuda.device_count())
        method = f"tcp://{store[0]}:{store[1]}"
        dist.init_process_group(
            "nccl", init_method=method, rank=rank, world_size=ranks, timeout=MEETING
        )
        return PeerMemory(dist.group.WORLD, device)
    if not interpreted():
        raise ConfigError(
            "link: symmetric needs GPUs (or TRITON_INTERPRET=1, to try it); use shared_memory"
        )
    return SharedMapping(path, rank, ranks)


class SymmetricCommunicator:
    """One rank's end of a `SymmetricRegion`, for partials [.., width] of up to `rows` rows."""

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
        self._flag = _map(region / FLAG)
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="symmetric-link", daemon=True)
        self._watcher.start()

    def post(self, partial: Tensor) -> Work:
        flat = partial.reshape(-1, partial.shape[-1])
        if len(flat) <= self._exchange.rows:
            post(flat, self._exchange)
            return partial.shape, None
        return partial.shape, self._reduce(flat)

    def post_product(self, x: Tensor, weight: Tensor) -> Work:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > self._exchange.rows:
            return self.post(F.linear(x, weight))
        gemv_post(flat, weight, self._exchange)
        return torch.Size((*x.shape[:-1], len(weight))), None

    def wait(self, ticket: Work) -> Tensor:
        shape, total = ticket
        if total is None:
            total = wait_sum(shape.numel() // shape[-1], self._exchange)
        self._check()
        summed: Tensor = total.view(shape)
        return summed

    def wait_add_norm(
        self, ticket: Work, residual: Tensor, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        shape, total = ticket
        if total is not None:
            whole = residual + total.view(shape)
            return whole, F.rms_norm(whole, gain.shape, gain, eps)
        flat = residual.reshape(-1, shape[-1])
        whole, normed = wait_add_norm(flat, gain, eps, self._exchange)
        self._check()
        return whole.view(shape), normed.view(shape)

    def close(self) -> None:
        self._flag[0] = 1
        self._closed.set()
        self._watcher.join()
        if self._device.type == "cuda":
            torch.distributed.destroy_process_group()

    def _watch(self) -> None:
        """Let waiting kernels go when the group is told to stop: they cannot be interrupted."""
        while not self._closed.wait(WATCH_S):
            if self._flag[0]:
                if self._device.type == "cuda":
                    with torch.cuda.stream(torch.cuda.Stream(self._device)):
                        self._stop()
                else:
                    self._stop()
                return

    def _stop(self) -> None:
        self._exchange.stop()
        self._reduce.stop()

    def _check(self) -> None:
        """On a GPU the wait is still to come; the group throws away what a broken pass computes."""
        if self._flag[0]:
            raise PeerLost("the group was told to stop")
