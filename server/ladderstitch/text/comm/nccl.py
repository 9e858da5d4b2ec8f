"""The link of ranks on GPUs: NCCL all-reduces on a stream of their own."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ladderstitch.text.comm.base import PeerLost, Work

TIMEOUT = timedelta(seconds=60)


class NcclCommunicator:
    """One rank's end; `store` is the host and port at which rank 0 gathers the group.

    NCCL chooses the order of summation, the same on all ranks. A group that loses a rank cannot be
    mended: all its ranks are replaced.
    """

    def __init__(self, store: tuple[str, int], rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        torch.cuda.set_device(rank % torch.cuda.device_count())
        host, port = store
        dist.init_process_group(
            "nccl",
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=ranks,
            timeout=TIMEOUT,
        )

    def post(self, partial: Tensor) -> Work:
        return dist.all_reduce(partial, async_op=True), partial

    def wait(self, ticket: Work) -> Tensor:
        work, partial = ticket
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerLost(f"NCCL: {error}") from error
        reduced: Tensor = partial
        return reduced

    def close(self) -> None:
        dist.destroy_process_group()
