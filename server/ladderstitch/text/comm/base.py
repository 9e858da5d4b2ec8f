"""The communicator protocol: start a sum over the ranks now, wait for its result later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from ladderstitch.errors import LadderstitchError

if TYPE_CHECKING:  # configurations are read where torch is not imported
    from torch import Tensor

Work: TypeAlias = Any
"""A communicator's handle of a reduction in flight; it is valid for one `wait`."""

PEER_TIMEOUT_S = 60.0
"""A peer whose partial does not arrive within this many seconds of a `wait` counts as lost."""


class PeerLost(LadderstitchError):
    """An error of a rank whose peer died or whose group was aborted.

    No reduction in flight will complete.
    """


class Communicator(Protocol):
    """One rank's end of the sums over all ranks of a group.

    Partials are added in the order of the ranks, so that all ranks get the same bits. At most two
    reductions may be in flight, and `wait` is called in the order in which they were started. All
    ranks start reductions of the same shapes in the same order.
    """

    rank: int
    ranks: int

    def all_reduce_async(self, partial: Tensor) -> Work:
        """Start the sum of a tensor over the ranks and return without waiting for them.

        The communicator may use the tensor until `wait` returns.
        """

    def wait(self, work: Work) -> Tensor:
        """Return the sum, in the partial's shape and dtype; raises `PeerLost` if a peer died."""

    def close(self) -> None:
        """Free all resources; peers that wait for this rank get `PeerLost`."""


@runtime_checkable
class FusedCommunicator(Communicator, Protocol):
    """A communicator whose kernels also do the work next to a reduction.

    That is the matrix product before it, and the residual add and RMS norm after it.
    """

    def all_reduce_product_async(self, x: Tensor, weight: Tensor) -> Work:
        """Start the sum over the ranks of x @ weight.T, x [T, K_r] and weight [D, K_r]."""

    def wait_add_norm(
        self, work: Work, residual: Tensor, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return r = residual + the sum, and rms_norm(r) * gain, both [T, D].

        Raises `PeerLost` if a peer died.
        """


def sum_in_rank_order(partials: Sequence[Tensor]) -> Tensor:
    """Return the sum of the ranks' partials, the same bits on all ranks.

    The partials are added in float32 and in the order of the ranks; the result has the first one's
    dtype.
    """
    first, *others = partials
    total = first.float()
    for other in others:
        total = total + other
    return total.to(first.dtype)


class SingleRankCommunicator:
    """The communicator of a group of one rank.

    Benchmarks also use it for ranks that do not communicate (scheme `no_communication`).
    """

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks

    def all_reduce_async(self, partial: Tensor) -> Work:
        """Return the partial itself as the handle."""
        return partial

    def wait(self, work: Work) -> Tensor:
        """Return the partial."""
        reduced: Tensor = work
        return reduced

    def close(self) -> None:
        """Do nothing: there are no resources."""


class _Spec(BaseModel):
    model_config = ConfigDict(defer_build=True)  # the help page checks none


class SharedMemorySpec(_Spec):
    """The parameters of a `SharedMemoryCommunicator`: a mapped file and an emulated link."""

    kind: Literal["shared_memory"] = "shared_memory"
    path: Path
    slot_bytes: int
    latency_s: float = 0.0
    bytes_per_s: float | None = None


class TcpSpec(_Spec):
    """The parameters of a `TcpCommunicator`: every rank's address and the group's secret."""

    kind: Literal["tcp"] = "tcp"
    addresses: tuple[tuple[str, int], ...]
    secret: str


class NcclSpec(_Spec):
    """The parameters of an `NcclCommunicator`: the address of rank 0's store."""

    kind: Literal["nccl"] = "nccl"
    store: tuple[str, int]


class SymmetricSpec(_Spec):
    """The parameters of a `SymmetricCommunicator`: its folder, and rank 0's store on GPUs."""

    kind: Literal["symmetric"] = "symmetric"
    path: Path
    store: tuple[str, int]


class SingleSpec(_Spec):
    """The parameters of a `SingleRankCommunicator`, which needs none."""

    kind: Literal["single"] = "single"


CommSpec = Annotated[
    SharedMemorySpec | TcpSpec | NcclSpec | SymmetricSpec | SingleSpec, Field(discriminator="kind")
]
"""The parameters with which every rank of a group creates its communicator."""
