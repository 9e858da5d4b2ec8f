"""What `overlap` measures: residual schemes on random weights, or the paths of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ladderstitch.errors import ConfigError
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import LayerRange, Route
from ladderstitch.text.model.residual import (
    ResidualScheme,
    Scheme,
    count_reductions,
    plan_layers,
)

SCHEMES: tuple[Scheme, ...] = (
    "standard",
    "ladder",
    "parallel",
    "desync",
    "groups",
    "no_communication",
)
ROUTE_SCHEMES: tuple[Scheme, ...] = ("standard", "ladder", "parallel", "no_communication")
"""Those that cross stitching layers."""
ROUTES = ("up", "down")
"""Names of the routes of a family: first half narrow, second half wide, and the reverse."""


def residual_of(scheme: Scheme, layers: int, ranks: int) -> ResidualScheme:
    """Return a scheme for all layers: groups are pairs, desync reduces after each MLP."""
    match scheme:
        case "groups":
            pairs = tuple((first, 2) for first in range(0, layers - 1, 2))
            return ResidualScheme(scheme="groups", groups=pairs)
        case "desync":
            pattern = ((False, True),) * layers
            return ResidualScheme(scheme="desync", reduce_after=pattern, ranks=ranks)
        case _:
            return ResidualScheme(scheme=scheme)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model with random weights."""

    width: int = 1536
    ffn: int = 4096
    layers: int = 20
    heads: int = 12
    kv_heads: int = 12
    vocabulary: int = 4096

    def config(self, positions: int) -> DecoderConfig:
        """Return the configuration for sequences of at most `positions` tokens."""
        return DecoderConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            max_positions=positions,
        )


@dataclass(frozen=True, slots=True)
class OverlapPlan:
    """The measurement: decode steps after a prompt, for every latency of the link.

    `batch` sequences have a prompt of `prompt` tokens. Each of `rounds` rounds takes `steps` decode
    steps per scheme. `latencies_s` are one-way latencies, emulated or (`tcp`) real delays.
    `front_width` is the width of a narrower anchor; set: `ROUTES` are measured, not one anchor.
    """

    shape: ModelShape
    front_width: int | None = None
    ranks: int = 2
    batch: int = 1
    prompt: int = 64
    steps: int = 4
    rounds: int = 9
    dtype: str = "float32"
    latencies_s: tuple[float, ...] = (0.0, 0.00025, 0.0005, 0.001, 0.0025)
    tcp: bool = False

    @property
    def routes(self) -> tuple[str, ...]:
        """The names of the measured routes."""
        return ROUTES if self.front_width else ("one anchor",)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The names of the measured schemes."""
        return ROUTE_SCHEMES if self.front_width else SCHEMES

    @property
    def residuals(self) -> tuple[ResidualScheme, ...]:
        """The measured schemes as data."""
        names = ROUTE_SCHEMES if self.front_width else SCHEMES
        return tuple(residual_of(name, self.shape.layers, self.ranks) for name in names)

    def path(self, route: str, scheme: str) -> int:
        """Return the number of the path of a route with a scheme."""
        return self.routes.index(route) * len(self.schemes) + self.schemes.index(scheme)

    def reductions(self) -> dict[str, int]:
        """Return the sums over ranks of a step by scheme, without that of the embedding."""
        return {
            name: 0
            if residual.scheme == "no_communication"
            else count_reductions(plan_layers(residual, self.shape.layers, self.ranks))
            for name, residual in zip(self.schemes, self.residuals, strict=True)
        }

    def _anchors(self) -> dict[str, object]:
        """Return the fields of a family of two anchors; none if there is no narrower one."""
        if self.front_width is None:
            return {}
        large = self.shape.config(self.prompt + 1)
        sizes = {
            "hidden_size": self.front_width,
            "intermediate_size": self.shape.ffn * self.front_width // self.shape.width,
        }
        half, last = self.shape.layers // 2, self.shape.layers - 1

        def route(front: int) -> Route:
            first = LayerRange(anchor=front, first=0, last=half - 1)
            return first, LayerRange(anchor=1 - front, first=half, last=last)

        routes = tuple(route(front) for front in range(len(ROUTES)) for _ in self.schemes)
        return {"anchors": (large.model_copy(update=sizes),), "routes": routes}

    def rank_config(self) -> RankConfig:
        """Return the configuration of the ranks, with one path per route and scheme."""
        return RankConfig.model_validate(
            self._anchors()
            | {
                "model": self.shape.config(self.prompt + 1),
                "paths": self.residuals * len(self.routes),
                "ranks": self.ranks,
                "dtype": self.dtype,
                "sequences": self.batch,
                "max_model_len": self.prompt + 1,
                "max_batched_tokens": self.batch * self.prompt,
            }
        )


@dataclass(frozen=True)
class BundlePlan(OverlapPlan):
    """The measurement of the paths of a bundle in place of random weights.

    Paths with low-bit matrices are left out. One path has the name `standard`.
    """

    folder: str = ""

    @classmethod
    def of(cls, bundle: TextBundle, **fields: Any) -> BundlePlan:
        """Return the plan for a bundle; raises `ConfigError` if it has no standard path."""
        config = bundle.manifest.config
        shape = ModelShape(
            config.hidden_size,
            config.intermediate_size,
            config.layers,
            config.heads,
            config.kv_heads,
            config.vocab_size,
        )
        plan = cls(shape, folder=str(bundle.path), **fields)
        if "standard" not in plan.schemes:
            raise ConfigError(f"model: expected a path standard, got {list(plan.schemes)}")
        return plan

    @cached_property
    def _bundle(self) -> TextBundle:
        whole = TextBundle.load(Path(self.folder), calibrated=False)
        names = [v.name for v in whole.manifest.variants if v.precision is None]
        return whole.with_paths(names)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The names of the paths, and no communication."""
        return (*(v.name for v in self._bundle.manifest.variants), "no_communication")

    @property
    def residuals(self) -> tuple[ResidualScheme, ...]:
        """The residual schemes of the paths, and no communication."""
        silent = ResidualScheme(scheme="no_communication")
        return (*(v.residual for v in self._bundle.manifest.variants), silent)

    def rank_config(self) -> RankConfig:
        """Return the configuration of the ranks, with all paths and one without communication."""
        bundle = self._bundle
        deltas = bundle.delta_files()
        return RankConfig.of(
            bundle,
            paths=self.residuals,
            deltas=(*deltas, None) if deltas else (),
            ranks=self.ranks,
            dtype=self.dtype,
            sequences=self.batch,
            max_model_len=self.prompt + 1,
            max_batched_tokens=self.batch * self.prompt,
        )
