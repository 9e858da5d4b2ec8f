"""Routes: which blocks of which anchors an input passes, and the stitching layers between them.

Every family of the package describes its networks with these two nouns; a family adds its blocks
and its way of enumerating routes (`snnet.py`), nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps `first` .. `last` (inclusive) of one anchor; empty when `last < first`.

    Steps are blocks, and in hierarchical networks the downsamplings between stages too.
    """

    anchor: int
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.anchor}[{self.first}..{self.last}]"


@dataclass(frozen=True, slots=True)
class Stitch:
    """One network of a family: an anchor alone, or anchors joined by stitching layers.

    `layers[i]` is the state-dict key of the affine map between `segments[i]` and
    `segments[i + 1]`, or `None` for an identity. The first segment's anchor embeds the input, the
    last one's classifies, after its final norm if `final_norm`. Numbers that a family's published
    numbering holds but nobody trains are not `usable`: they run, but nothing plans with them.
    """

    id: int
    segments: tuple[Segment, ...]
    layers: tuple[str | None, ...]
    final_norm: bool
    usable: bool = True

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
        return len(self.segments) == 1

    @property
    def name(self) -> str:
        """Readable and unique within a family, e.g. `anchor-2` or `0[0..3]+1[4..7]`."""
        if self.is_anchor:
            return f"anchor-{self.front}"
        return "+".join(str(segment) for segment in self.segments)
