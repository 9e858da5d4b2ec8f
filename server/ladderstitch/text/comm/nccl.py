"""The communicator of ranks on GPUs: NCCL all-reduces on a separate CUDA stream."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ladderstitch.addresses import join_address
from ladderstitch.text.comm.base import PeerLost, Work

TIMEOUT = timedelta(seconds=60)


class NcclCommunicator:
    """One rank's end of an NCCL process group.

    `store` is the host and port at which rank 0 runs the rendezvous store. NCCL chooses the order
    of summation, which is the same on all ranks. A group cannot survive the loss of a rank: all of
    its ranks are restarted.
    """

    def __init__(self, store: tuple[str, int], rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group(
            "nccl",
            init_method=f"tcp://{join_address(*store)}",
            rank=rank,
            world_size=ranks,
            timeout=TIMEOUT,
        )

    def all_reduce_async(self, partial: Tensor) -> Work:
        """Start the sum of a tensor over the ranks, in place."""
        return dist.all_reduce(partial, async_op=True), partial

    def wait(self, work: Work) -> Tensor:
        """Return the sum; raises `PeerLost` if NCCL reports an error."""
        handle, partial = work
        try:
            handle.wait()
        except RuntimeError as error:
            raise PeerLost(f"NCCL: {error}") from error
        reduced: Tensor = partial
        return reduced

    def close(self) -> None:
        """Destroy the process group."""
        dist.destroy_process_group()
