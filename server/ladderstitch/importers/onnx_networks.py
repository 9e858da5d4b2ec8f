"""Read the ONNX networks of a family, their settings and labels, and check that they agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ladderstitch.bundles.files import read_yaml, validate
from ladderstitch.errors import ConfigError
from ladderstitch.importers.image_settings import WHOLE, ImageSettings, read_settings
from ladderstitch.importers.network_outputs import OutputChoice, find_outputs
from ladderstitch.vision.bundle import (
    Preprocessing,
)
from ladderstitch.vision.networks.order import network_inputs
from ladderstitch.vision.networks.outputs import OutputEntry
from ladderstitch.vision.networks.probe import check_batches, open_quietly
from ladderstitch.vision.networks.reader import read_network
from ladderstitch.vision.networks.scaling import Scaling, scaling_between
from ladderstitch.vision.networks.units import Network

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
    """Name and licence of a bundle, and what the user states about inputs and outputs.

    `input_shape` is that of inputs that are no images, without the batch, if a file leaves it open.
    """

    name: str
    licence: str = "not stated"
    settings: ImageSettings = field(default_factory=ImageSettings)
    outputs: OutputChoice = "auto"
    input_shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class LoadedFamily:
    """Networks for inputs of one shape, cheapest first, with what their bundle states.

    `preprocessing` is None if the inputs are no images. `outputs` is empty if the networks
    classify; `output_names` has each network's own names of the outputs.
    """

    sources: tuple[NetworkSource, ...]
    networks: tuple[Network, ...]
    settings: tuple[ImageSettings, ...]
    info: FamilyInfo
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    outputs: tuple[OutputEntry, ...] = ()
    output_names: tuple[tuple[str, ...], ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        (shape,) = self.networks[-1].info.inputs.values()
        images = self.preprocessing
        return shape if images is None else (shape[0], images.height, images.width)

    def kept_share(self, position: int) -> float | None:
        """Return the share of the sides of the bundle's images that a network keeps; None: all."""
        own, images = self.settings[position].crop, self.preprocessing
        if images is None or images.crop is None or own is None or own == images.crop:
            return None
        return float(own) / images.crop

    @property
    def scalings(self) -> list[Scaling | None]:
        """The change from the bundle's images to those of each network; None if equal."""
        if self.preprocessing is None:
            return [None for _ in self.networks]
        given = (self.preprocessing.mean, self.preprocessing.std)
        size = (self.preprocessing.height, self.preprocessing.width)
        return [
            scaling_between(
                given,
                (settings.mean or given[0], settings.std or given[1]),
                sizes=(size, self.own_size(position) or size),
                share=self.kept_share(position) or 1.0,
                resize=self.preprocessing.resize,
            )
            for position, settings in enumerate(self.settings)
        ]

    def own_size(self, position: int) -> tuple[int, int] | None:
        """Return height and width of a network's images; None if they are the bundle's."""
        (shape,) = self.networks[position].info.inputs.values()
        if self.preprocessing is None or shape == self.input_shape:
            return None
        return shape[1], shape[2]


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
        network = Network(source.path, find_input_shape(source.path, settings, info.input_shape))
        check_batches(open_quietly(network.model, source.path), source.path)
        on_network(network)
        loaded.append((source, network, settings))
    loaded.sort(key=lambda entry: entry[1].info.macs)
    _check_same([(source.name, n, s) for source, n, s in loaded])
    networks = [network for _, network, _ in loaded]
    all_settings = [settings for _, _, settings in loaded]
    outputs = find_outputs(networks, all_settings, info.outputs)
    return LoadedFamily(
        tuple(source for source, _, _ in loaded),
        tuple(networks),
        tuple(all_settings),
        info,
        _find_preprocessing(networks, all_settings),
        outputs.labels,
        outputs.entries,
        outputs.names,
    )


def _find_preprocessing(
    networks: Sequence[Network], all_settings: Sequence[ImageSettings]
) -> Preprocessing | None:
    """Return the preprocessing of images, or None for inputs that are no images.

    The images keep the largest part that a network keeps, and are so large that no network lacks
    pixels.
    """
    shapes = [next(iter(network.info.inputs.values())) for network in networks]
    if not _is_image(shapes[-1]):
        return None
    settings = all_settings[-1]
    crops = [s.crop for s in all_settings if isinstance(s.crop, float)]
    if crops:
        settings = replace(settings, crop=max(crops))
    channels, _, _ = shapes[-1]
    kept = settings.crop if isinstance(settings.crop, float) else 1.0
    own = [s.crop if isinstance(s.crop, float) else kept for s in all_settings]
    height, width = (
        max(round(shape[axis] * kept / share) for shape, share in zip(shapes, own, strict=True))
        for axis in (1, 2)
    )
    try:
        return Preprocessing.model_validate(settings.preprocessing((channels, height, width)))
    except ValidationError as error:
        raise ConfigError(f"preprocessing: {error}") from error


def _is_image(shape: Sequence[int]) -> bool:
    """Return whether inputs of this shape are images of one or three channels."""
    return len(shape) == 3 and shape[0] in (0, 1, 3)


def find_input_shape(
    path: Path, settings: ImageSettings, stated: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return the shape of the inputs of the network in a file, without the batch.

    Sizes that the file leaves open come from `stated`, or from the settings of images. Raises
    `ConfigError` if there is not one input, or if a size stays open.
    """
    model = read_network(path)
    inputs = network_inputs(model.graph)
    dims = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if inputs else []
    if len(inputs) != 1 or not dims:
        names = ", ".join(value.name[:80] for value in inputs)
        raise ConfigError(
            f"{path}: expected one input with the batch as its first axis, got {len(inputs)} "
            f"({names}) of shape {dims}"
        )
    if stated is not None:
        return stated
    if _is_image(dims[1:]):
        height, width = settings.size or (DEFAULT_SIZE, DEFAULT_SIZE)
        return dims[1] or 3, dims[2] or height, dims[3] or width
    if 0 in dims[1:]:
        shown = [dim or "?" for dim in dims[1:]]
        raise ConfigError(
            f"{path}: expected the sizes of the input {inputs[0].name[:80]!r}, got {shown}; state "
            "them with --input-shape"
        )
    return tuple(dims[1:])


def _check_same(loaded: Sequence[tuple[str, Network, ImageSettings]]) -> None:
    """Raise `ConfigError` unless all networks can share one image and one list of labels."""
    kinds = {kind for _, _, settings in loaded if (kind := _kind_of_crop(settings)) is not None}
    if len(kinds) > 1:
        raise ConfigError(
            "crop: expected all networks to stretch images, or all to keep a centred square, got "
            "both; --crop states it for all"
        )
    for (name, network, settings), (other, following, others) in pairwise(loaded):
        pairs: dict[str, list[Any]] = {
            "input shape": [_without_sides(n) for n in (network, following)],
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


def _without_sides(network: Network) -> tuple[int, ...]:
    """Return the shape of an input; for images only the channels, as images are resized."""
    (shape,) = network.info.inputs.values()
    return shape[:1] if _is_image(shape) else shape


def _kind_of_crop(settings: ImageSettings) -> str | None:
    """Return whether images are stretched or cropped; a centred square has another content."""
    if settings.crop is None or settings.crop == WHOLE:
        return settings.crop
    return "a centred square"
