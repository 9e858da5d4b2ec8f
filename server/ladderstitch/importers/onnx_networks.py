"""Read the ONNX networks of a family, their settings and labels, and check that they agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ladderstitch.bundles.files import read_yaml, validate
from ladderstitch.errors import ConfigError
from ladderstitch.importers.image_settings import ImageSettings, read_settings
from ladderstitch.vision.bundle import (
    Preprocessing,
)
from ladderstitch.vision.networks.export import scaling_between
from ladderstitch.vision.networks.order import network_inputs
from ladderstitch.vision.networks.probe import check_batches, open_quietly
from ladderstitch.vision.networks.reader import read_network
from ladderstitch.vision.networks.units import Network, Scaling

DEFAULT_SIZE = 224
"""Height and width of the images of a network that takes any size, unless a file states it."""


@dataclass(frozen=True, slots=True)
class NetworkSource:
    """The file of a network, its name, and its quality from 0 to 1 if the user knows it."""

    path: Path
    name: str
    quality: float | None = None


@dataclass(frozen=True, slots=True)
class FamilyInfo:
    """Name and licence of a bundle, and the settings of images that the user gave."""

    name: str
    licence: str = "not stated"
    settings: ImageSettings = field(default_factory=ImageSettings)


@dataclass(frozen=True, slots=True)
class LoadedFamily:
    """Networks for images of one size, cheapest first, with what their bundle states."""

    sources: tuple[NetworkSource, ...]
    networks: tuple[Network, ...]
    settings: tuple[ImageSettings, ...]
    info: FamilyInfo
    preprocessing: Preprocessing
    labels: tuple[str, ...]

    @property
    def scalings(self) -> list[Scaling | None]:
        """The change from the bundle's images to those of each network; None if equal."""
        given = (self.preprocessing.mean, self.preprocessing.std)
        own = [(s.mean or given[0], s.std or given[1]) for s in self.settings]
        return [scaling_between(given, values) for values in own]


class NamedNetwork(BaseModel):
    """One network in a `family.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="ONNX file, relative to the `family.yaml`")
    name: str | None = None
    quality: float | None = Field(None, ge=0, le=1)


class FamilyFile(BaseModel):
    """The content of a `family.yaml`: networks of one task, among which budgets choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    networks: tuple[NamedNetwork, ...] = Field(min_length=1, max_length=64)


def find_sources(paths: Sequence[Path]) -> list[NetworkSource]:
    """Return the networks in ONNX files and in `family.yaml` files, in order.

    Raises `BundleError` for a `family.yaml` that cannot be read.
    """
    sources = []
    for path in paths:
        if path.suffix in (".yaml", ".yml"):
            family = validate(path, FamilyFile, read_yaml(path))
            sources += [
                NetworkSource(path.parent / n.file, n.name or Path(n.file).stem, n.quality)
                for n in family.networks
            ]
        else:
            sources.append(NetworkSource(path, path.stem))
    return sources


def load_family(
    sources: Sequence[NetworkSource],
    info: FamilyInfo,
    on_network: Callable[[Network], None] = lambda network: None,
) -> LoadedFamily:
    """Return the networks of the files, checked and measured, cheapest first.

    Raises `BundleError` for a network that cannot be served, and `ConfigError` if the networks do
    not take the same images or do not return the same scores.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"networks: expected different names, got {names}")
    loaded = []
    for source in sources:
        settings = info.settings.over(read_settings(source.path))
        network = Network(source.path, image_shape(source.path, settings))
        check_batches(open_quietly(network.model, source.path), source.path)
        on_network(network)
        loaded.append((source, network, settings))
    loaded.sort(key=lambda entry: entry[1].info.macs)
    _check_same([(source.name, n, s) for source, n, s in loaded])
    _, network, last = loaded[-1]
    (shape,) = network.info.inputs.values()
    channels, height, width = shape
    try:
        fields = last.preprocessing((channels, height, width))
        preprocessing = Preprocessing.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"preprocessing: {error}") from error
    return LoadedFamily(
        tuple(source for source, _, _ in loaded),
        tuple(network for _, network, _ in loaded),
        tuple(settings for _, _, settings in loaded),
        info,
        preprocessing,
        _find_labels(network, [settings for _, _, settings in loaded]),
    )


def image_shape(path: Path, settings: ImageSettings) -> tuple[int, int, int]:
    """Return the shape [C, H, W] of the images of the network in a file.

    Sizes that the file leaves open come from the settings.
    """
    model = read_network(path)
    inputs = network_inputs(model.graph)
    dims = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if inputs else []
    if len(inputs) != 1 or len(dims) != 4:
        names = ", ".join(value.name[:80] for value in inputs)
        raise ConfigError(
            f"{path}: expected one input, images [batch, channels, height, width], got "
            f"{len(inputs)} ({names}) of shape {dims}"
        )
    height, width = settings.size or (DEFAULT_SIZE, DEFAULT_SIZE)
    return dims[1] or 3, dims[2] or height, dims[3] or width


def _check_same(loaded: Sequence[tuple[str, Network, ImageSettings]]) -> None:
    """Raise `ConfigError` unless all networks can share one image and one list of labels."""
    for (name, network, settings), (other, following, others) in pairwise(loaded):
        pairs: dict[str, list[Any]] = {
            "image shape": [*network.info.inputs.values(), *following.info.inputs.values()],
            "scores": [*network.info.outputs.values(), *following.info.outputs.values()],
            "crop": [settings.crop, others.crop],
            "interpolation": [settings.resize, others.resize],
            "labels": [settings.labels, others.labels],
        }
        for what, (first, second) in pairs.items():
            if first != second and None not in (first, second):
                shown = [str(value)[:100] for value in (first, second)]
                raise ConfigError(
                    f"{what}: expected the same for all networks, got {shown[0]} for {name} and "
                    f"{shown[1]} for {other}; an option states it for all"
                )


def _find_labels(network: Network, settings: Sequence[ImageSettings]) -> tuple[str, ...]:
    """Return the labels of the classes, which are numbers if no file has their names."""
    (scores,) = network.info.outputs.values() or [()]
    if not scores or int(np.prod(scores)) != scores[0]:
        raise ConfigError(
            f"{network.path}: expected class scores [batch, classes], got outputs of shape "
            f"[batch, {', '.join(map(str, scores))}]; dense outputs can be inspected, not served"
        )
    known = [s.labels for s in settings if s.labels is not None]
    labels = known[-1] if known else tuple(f"class {i}" for i in range(scores[0]))
    if len(labels) != scores[0]:
        raise ConfigError(f"labels: expected {scores[0]} from the network, got {len(labels)}")
    return labels
