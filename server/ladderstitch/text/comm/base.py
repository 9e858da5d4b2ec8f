"""How ranks add up their partial results: start a reduction now, collect its sum later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import BaseModel, Field
from torch import Tensor

from ladderstitch.errors import LadderstitchError

Work: TypeAlias = Any
"""A link's own mark of a reduction in flight; good for one `wait`."""


class PeerLost(LadderstitchError):
    """A peer is gone, or the group was told to stop; nothing that was posted will arrive."""


class Communicator(Protocol):
    """Sums over the ranks of a group, in rank order, so that all ranks get the same bits.

    At most two reductions may be in flight, and they are waited for in the order of posting; all
    ranks post the same shapes in the same order. `post` may keep the tensor until it is waited for.
    """

    rank: int
    ranks: int

    def post(self, partial: Tensor) -> Work:
        """Start the sum of this tensor over the ranks; does not wait for them."""

    def wait(self, ticket: Work) -> Tensor:
        """The sum, in the partial's shape and dtype. Raises `PeerLost`."""

    def close(self) -> None:
        """Free what the link holds; peers that wait for this rank get `PeerLost`."""


@runtime_checkable
class FusedCommunicator(Communicator, Protocol):
    """A link whose kernels do a neighbour's work on the way: the product before a reduction, the
    residual add and norm after it."""

    def post_product(self, x: Tensor, weight: Tensor) -> Work:
        """Start the sum of x @ weight.T over the ranks: [N, K_r] by [D, K_r]."""

    def wait_add_norm(
        self, ticket: Work, residual: Tensor, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """r = residual + the sum, and rms_norm(r) * gain; both [N, D]. Raises `PeerLost`."""


def sum_in_rank_order(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of every rank's partial, in float32 and in rank order, in the dtype of the
    first: the same bits on all ranks."""
    first, *others = parts
    total = first.float()
    for other in others:
        total = total + other
    return total.to(first.dtype)


class SingleRank:
    """The link of a group of one, and (`no_communication`) of ranks that do not talk."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks

    def post(self, partial: Tensor) -> Work:
        return partial

    def wait(self, ticket: Work) -> Tensor:
        reduced: Tensor = ticket
        return reduced

    def close(self) -> None:
        """Nothing is held."""


CommKind = Literal["shared_memory", "tcp", "nccl", "symmetric"]
CommChoice = Literal["auto", CommKind]


class SharedMemorySpec(BaseModel):
    kind: Literal["shared_memory"] = "shared_memory"
    path: Path
    slot_bytes: int
    latency_s: float = 0.0
    bytes_per_s: float | None = None


class TcpSpec(BaseModel):
    kind: Literal["tcp"] = "tcp"
    addresses: tuple[tuple[str, int], ...]
    secret: str


class NcclSpec(BaseModel):
    kind: Literal["nccl"] = "nccl"
    store: tuple[str, int]


class SymmetricSpec(BaseModel):
    kind: Literal["symmetric"] = "symmetric"
    path: Path
    store: tuple[str, int]


class SingleSpec(BaseModel):
    kind: Literal["single"] = "single"


CommSpec = Annotated[
    SharedMemorySpec | TcpSpec | NcclSpec | SymmetricSpec | SingleSpec, Field(discriminator="kind")
]
"""How the ranks of one group, as it stands at present, reach each other."""
