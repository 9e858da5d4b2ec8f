"""One pass of a trainable family over tokens: which planes each token runs, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.family import DecoderFamily, Plane
from ladderstitch.training.text.family_routes import Route, Span
from ladderstitch.training.text.trainable_llama import StreamState


@dataclass(frozen=True, slots=True)
class FamilyPass:
    """One pass over tokens [B, T]: where each of them goes, and the streams so far."""

    family: DecoderFamily
    tokens: Tensor
    routes: Mapping[Route, Tensor]
    """The positions [T_r] that take each route."""
    taken: Mapping[Plane, Tensor]
    """The positions [T_p] that run each plane, in order."""
    previous: Mapping[Plane, Mapping[Plane, Tensor]]
    """By plane: the positions that come from each other one."""
    after: dict[Plane, StreamState] = field(default_factory=dict)
    """The streams [B, T_p, D] after each plane."""

    @classmethod
    def of(cls, family: DecoderFamily, spans: Sequence[Span], tokens: Tensor) -> FamilyPass:
        """Return a pass that has not begun; raises `ConfigError` as `final_hidden` does."""
        if (total := sum(span.tokens for span in spans)) != tokens.shape[1]:
            raise ConfigError(f"spans: expected {tokens.shape[1]} tokens, got {total}")
        ranges: dict[Route, list[Tensor]] = {}
        at = 0
        for span in spans:
            ranges.setdefault(span.route, []).append(torch.arange(at, at + span.tokens))
            at += span.tokens
        routes = {route: torch.cat(parts) for route, parts in ranges.items()}
        taken: dict[Plane, list[Tensor]] = {}
        previous: dict[Plane, dict[Plane, list[Tensor]]] = {}
        for route, positions in routes.items():
            planes = family.planes(route.segments(family))
            for plane in planes:
                taken.setdefault(plane, []).append(positions)
            for front, plane in pairwise(planes):
                previous.setdefault(plane, {}).setdefault(front, []).append(positions)
        return cls(
            family,
            tokens,
            routes,
            {plane: _sorted(parts) for plane, parts in taken.items()},
            {
                plane: {front: _sorted(parts) for front, parts in fronts.items()}
                for plane, fronts in previous.items()
            },
        )

    @property
    def order(self) -> list[Plane]:
        """The planes that some tokens run, by their relative depth.

        A translated stream is then known before the plane that needs it, because a layer is paired
        with one that is later by less than one layer.
        """
        depths = self.family.depths
        return sorted(self.taken, key=lambda p: (p.layer / depths[p.anchor], p.anchor))

    def origins(self, plane: Plane) -> dict[Plane, Tensor]:
        """Return the positions that do not run a plane, by the plane that is translated instead."""
        found: dict[Plane, list[Tensor]] = {}
        for route, positions in self.routes.items():
            segments = route.segments(self.family)
            if plane not in self.family.planes(segments):
                origin = self.family.origin(plane, segments)
                assert origin is not None, "a path of the family has an origin of every plane"
                found.setdefault(origin, []).append(positions)
        return {origin: _sorted(parts) for origin, parts in found.items()}


def _sorted(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)).sort().values
