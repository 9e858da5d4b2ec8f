"""Routes: the blocks of the anchors that an input passes, and the stitching layers between them.

Every family describes its networks with `Segment` and `Stitch`. A family adds only its blocks and
the enumeration of its routes (`snnet.py`, `snnet_staged.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["float32", "int8"]
"""Number format in which a network computes: weights, and the inputs of its products."""


Group = tuple[int, int]
"""First step and number of steps that read one input (`parallel.py`)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of steps of one anchor, `first` to `last` inclusive; empty if `last < first`.

    A step is a block or, in hierarchical networks, a downsampling between stages. The steps of each
    of the `groups` run as one part, all others one by one.
    """

    anchor: int
    first: int
    last: int
    groups: tuple[Group, ...] = ()

    @property
    def parts(self) -> tuple[Group, ...]:
        """First step and number of steps of each part, in order."""
        sizes, parts, step = dict(self.groups), [], self.first
        while step <= self.last:
            parts.append((step, sizes.get(step, 1)))
            step += parts[-1][1]
        return tuple(parts)

    def __str__(self) -> str:
        return f"{self.anchor}[{self.first}..{self.last}]"


@dataclass(frozen=True, slots=True)
class Stitch:
    """One network of a family: an anchor alone, or anchors joined by stitching layers.

    `layers[i]` is the state-dict key of the affine map between `segments[i]` and
    `segments[i + 1]`, or `None` for an identity. The first segment's anchor embeds the input. The
    last segment's anchor classifies, after its final norm if `final_norm` is set. A network that is
    part of a family's published numbering but is never trained is not `usable`: it can run, but it
    is neither calibrated nor scheduled.
    """

    id: int
    segments: tuple[Segment, ...]
    layers: tuple[str | None, ...]
    final_norm: bool
    usable: bool = True
    precision: Precision = "float32"
    given_name: str = ""
    """Name in float32 if the family names its networks itself."""
    nested: bool = False
    """Whether the network is a path of a supernet, which has no anchors."""

    def __post_init__(self) -> None:
        if not self.segments or len(self.layers) != len(self.segments) - 1:
            raise ValueError(
                f"stitch {self.id}: expected one stitching layer between neighbouring segments, "
                f"got {len(self.layers)} for {len(self.segments)} segments"
            )

    @property
    def front(self) -> int:
        """Index of the anchor that embeds the input."""
        return self.segments[0].anchor

    @property
    def end(self) -> int:
        """Index of the anchor that classifies."""
        return self.segments[-1].anchor

    @property
    def is_anchor(self) -> bool:
        """Whether the network is a complete anchor, block after block."""
        return len(self.segments) == 1 and not self.segments[0].groups and not self.nested

    @property
    def name(self) -> str:
        """Name that is unique within the family, e.g. `anchor-2` or `0[0..3]+1[4..7]-int8`."""
        suffix = "" if self.precision == "float32" else f"-{self.precision}"
        if self.given_name:
            return self.given_name + suffix
        if self.is_anchor:
            return f"anchor-{self.front}{suffix}"
        return "+".join(str(segment) for segment in self.segments) + suffix
