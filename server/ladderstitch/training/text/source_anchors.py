"""Trained language models that become the anchors of a stitched family, checked against each other.

They share the tokenizer and the shape of keys and values; widths may differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import ANCHOR_FIELDS
from ladderstitch.text.model.family_weights import anchor_prefix
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weights import expected_shapes

MAX_NAME = 24
"""Characters of an anchor's name, of which a path's name has two and a number."""
STITCHABLE = ("standard", "ladder")
NOT_COMPARED = {*ANCHOR_FIELDS, "max_positions"}


@dataclass(frozen=True, slots=True)
class SourceAnchors:
    """The models that are stitched, fewest parameters first, with their distinct names."""

    names: tuple[str, ...]
    bundles: tuple[TextBundle, ...]

    @classmethod
    def check(cls, bundles: Sequence[TextBundle]) -> SourceAnchors:
        """Return the anchors in order; raise `ConfigError` if they cannot be stitched."""
        if len(bundles) < 2:
            raise ConfigError(f"networks: expected two or more models, got {len(bundles)}")
        for bundle in bundles:
            _check_alone(bundle)
        ordered = tuple(sorted(bundles, key=_num_parameters))
        names = tuple(_short_name(bundle) for bundle in ordered)
        if len(set(names)) < len(names):
            names = tuple(f"{name[: MAX_NAME - 3]}-{n}" for n, name in enumerate(names))
        for name, bundle in zip(names[:-1], ordered, strict=False):
            _check_pair(name, bundle, names[-1], ordered[-1])
        for (small, first), (large, second) in pairwise(zip(names, ordered, strict=True)):
            if first.manifest.config == second.manifest.config:
                raise ConfigError(
                    f"{large}: expected another size than that of {small}, got the same config"
                )
        return cls(names, ordered)

    @property
    def largest(self) -> TextBundle:
        """The model with the most parameters, from which the family takes all but its weights."""
        return self.bundles[-1]

    @property
    def residual(self) -> ResidualScheme:
        """The residual scheme of all anchors."""
        return self.largest.manifest.variants[0].residual

    @property
    def configs(self) -> tuple[DecoderConfig, ...]:
        """The configurations; all have as many positions as the anchor with the fewest."""
        own = [bundle.manifest.config for bundle in self.bundles]
        positions = min(config.max_positions for config in own)
        return tuple(config.model_copy(update={"max_positions": positions}) for config in own)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as they are stored, by their names in the bundle of a family."""
        for number, bundle in enumerate(self.bundles):
            prefix, weights = anchor_prefix(number, len(self.bundles)), bundle.weights()
            for name in expected_shapes(bundle.manifest.config):
                yield prefix + name, weights.read(name).clone()


def _num_parameters(bundle: TextBundle) -> int:
    return sum(map(prod, expected_shapes(bundle.manifest.config).values()))


def _short_name(bundle: TextBundle) -> str:
    """Return the model's name in the characters and the length that a path's name allows."""
    name = re.sub(r"[^a-z0-9._-]+", "-", bundle.manifest.name)[:MAX_NAME]
    return name.strip("-._") or "model"


def _check_alone(bundle: TextBundle) -> None:
    """Raise `ConfigError` for a model that can be no anchor, whatever the others are."""
    manifest, path = bundle.manifest, bundle.path
    first = manifest.variants[0]
    if manifest.anchors:
        raise ConfigError(f"{path}: expected a single model, got a family of anchors")
    if not manifest.config.is_llama:
        raise ConfigError(
            f"{path}: expected Llama's layers, the only ones that can be stitched, got others"
        )
    if first.residual.scheme not in STITCHABLE:
        raise ConfigError(
            f"{path}: residual: expected standard or ladder, got {first.residual.scheme}"
        )
    if first.delta or first.precision:
        raise ConfigError(f"{path}: expected a first path without delta and precision")


def _check_pair(name: str, bundle: TextBundle, largest: str, reference: TextBundle) -> None:
    """Raise `ConfigError` naming what a model must share with the largest one and does not."""
    own, expected = bundle.manifest.config.model_dump(), reference.manifest.config.model_dump()
    wrong = [
        f"{field}: expected {expected[field]}, as in {largest}, got {own[field]}"
        for field in expected
        if field not in NOT_COMPARED and own[field] != expected[field]
    ]
    residual, other = (b.manifest.variants[0].residual for b in (bundle, reference))
    if residual != other:
        wrong.append(f"residual: expected {other.scheme}, as in {largest}, got {residual.scheme}")
    if other.ladder_layers is not None and own["layers"] != expected["layers"]:
        wrong.append(
            f"layers: expected {expected['layers']}, as in {largest}, because only some of them "
            f"are ladder layers, got {own['layers']}"
        )
    if wrong:
        raise ConfigError(f"{name}: {'; '.join(wrong)}")
    if (difference := bundle.tokenizer().difference(reference.tokenizer())) is not None:
        raise ConfigError(f"{name}: tokenizer: expected that of {largest}, got {difference}")
