"""The measured cost of a change of path within an answer: `switches.json` of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field


class Penalty(BaseModel):
    """The cost in quality of one change of path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: int = Field(ge=0)
    target: int = Field(ge=0)
    nats: float = Field(
        ge=0, description="mean divergence from an answer that was on the target from the start"
    )


class SwitchTable(BaseModel):
    """The contents of `switches.json`: the changes of path that an answer may make.

    A change after `context` tokens was measured over the next `tokens` tokens, on held-out text:
    KL(target from the start || after the change), in nats per token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    date: str
    versions: dict[str, str]
    context: int = Field(gt=0)
    tokens: int = Field(gt=0)
    windows: int = Field(gt=0, description="number of texts that were measured")
    penalties: tuple[Penalty, ...]

    @cached_property
    def _nats(self) -> dict[tuple[int, int], float]:
        return {(p.source, p.target): p.nats for p in self.penalties}

    def nats(self, source: int, target: int) -> float | None:
        """Return the penalty of a change, None if it was not measured."""
        return self._nats.get((source, target))

    def with_paths(self, kept: Sequence[int]) -> SwitchTable:
        """Return the table of a model with only these paths, in their order."""
        new = {old: number for number, old in enumerate(kept)}
        penalties = tuple(
            Penalty(source=new[p.source], target=new[p.target], nats=p.nats)
            for p in self.penalties
            if p.source in new and p.target in new
        )
        return self.model_copy(update={"penalties": penalties})

    def targets(self, source: int) -> frozenset[int]:
        """Return the paths to which an answer on `source` may change."""
        return frozenset(p.target for p in self.penalties if p.source == source)
