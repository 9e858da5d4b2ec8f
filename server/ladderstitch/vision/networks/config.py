"""Configuration of a family of ONNX networks: the networks, their cuts, and the stitched paths.

Networks alone are a family without stitches. A path runs the front network up to one of its cuts,
an affine map, and the end network from one of its cuts. Everything but the weights is data here, so
that planning and counting read no network.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from ladderstitch.errors import BundleError
from ladderstitch.vision.models.route import Segment, Stitch
from ladderstitch.vision.models.stitched import StitchedModel
from ladderstitch.vision.networks.outputs import OutputEntry

FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.onnx$"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


MAX_INPUT_ELEMENTS = 1 << 28
"""Elements of one input that is not an image."""


class NetworkInputs(BaseModel):
    """Shape of the images that all networks take, and the number of their classes.

    Networks that return tensors without class scores have no classes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: Literal[1, 3] = 3
    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    num_classes: int | None = Field(None, gt=0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, [C, H, W]."""
        return self.in_channels, self.height, self.width


class TensorInputs(BaseModel):
    """Name and shape, without the batch, of the float32 tensor that all networks take.

    It is no image: requests state it as a tensor.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    shape: tuple[int, ...] = Field(max_length=15)
    num_classes: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check_shape(self) -> TensorInputs:
        """Raise `ValueError` for a shape that no input has."""
        if min(self.shape, default=1) < 1 or math.prod(self.shape) > MAX_INPUT_ELEMENTS:
            raise ValueError(
                f"shape: expected 1 to {MAX_INPUT_ELEMENTS} elements, got {list(self.shape)}"
            )
        return self


def _inputs_kind(value: object) -> str:
    """Return whether inputs are images or tensors; only tensors have a field `shape`."""
    is_tensor = "shape" in value if isinstance(value, dict) else isinstance(value, TensorInputs)
    return "tensor" if is_tensor else "image"


AnyInputs = Annotated[
    Annotated[NetworkInputs, Tag("image")] | Annotated[TensorInputs, Tag("tensor")],
    Discriminator(_inputs_kind),
]


class NetworkEntry(BaseModel):
    """One network: its file, its outputs, and its costs by steps, the parts between its cuts.

    `mean`, `std` and `size` are the network's own if they differ from those of the bundle, and
    `crop` is the part of the bundle's images that it keeps; images are cropped, resized and scaled
    from the one to the other before the first step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME)
    file: str = Field(pattern=FILE_NAME, description="in the folder `networks` of the bundle")
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = Field(None, description="height and width of its images")
    crop: float | None = Field(
        None, gt=0, lt=1, description="side of the centred part that is kept, as a share"
    )
    cuts: tuple[str, ...] = Field((), description="tensors between the steps, in order")
    macs: tuple[int, ...] = Field(description="multiply-accumulates of each step")
    parameters: tuple[int, ...] = Field(description="weights of each step")
    outputs: tuple[str, ...] = Field(
        (), description="its names of the outputs of the family, in their order; unset: the same"
    )

    @model_validator(mode="after")
    def _check_steps(self) -> NetworkEntry:
        """Raise `ValueError` unless there are costs for one step more than cuts."""
        for field in ("macs", "parameters"):
            if (got := len(getattr(self, field))) != len(self.cuts) + 1:
                raise ValueError(f"{field}: expected {len(self.cuts) + 1} values, got {got}")
        return self


class StitchedPath(BaseModel):
    """A path from one network to another: positions of both, and of the cuts in their lists."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    front: int = Field(ge=0)
    leave: int = Field(ge=0, description="cut of the front network after which the map follows")
    end: int = Field(ge=0)
    enter: int = Field(ge=0, description="cut of the end network that the map replaces")
    macs: int = Field(ge=0, description="multiply-accumulates of the map")
    parameters: int = Field(ge=0, description="weights of the map")

    @property
    def layer(self) -> str:
        """Name of the map, under which its weights are stored; equal joints share it."""
        return f"map-{self.front}-{self.leave}-{self.end}-{self.enter}"


class OnnxConfig(BaseModel):
    """Configuration of a family of ONNX networks.

    Without `outputs` the networks classify: they return one tensor, scores [batch, classes].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["onnx"] = "onnx"
    inputs: AnyInputs
    outputs: tuple[OutputEntry, ...] = ()
    networks: tuple[NetworkEntry, ...] = Field(min_length=1, description="cheapest first")
    paths: tuple[StitchedPath, ...] = ()

    @model_validator(mode="after")
    def _check_outputs(self) -> OnnxConfig:
        """Raise `ValueError` for names that are not unique, and scores without classes."""
        names = [output.name for output in self.outputs]
        if len(set(names)) < len(names):
            raise ValueError(f"outputs.name: expected each once, got {names}")
        for number, network in enumerate(self.networks):
            if network.outputs and len(network.outputs) != len(names):
                raise ValueError(
                    f"networks.{number}.outputs: expected {len(names)} names, got "
                    f"{list(network.outputs)}"
                )
        scores = [output for output in self.outputs if output.kind == "scores"]
        wrong = [o.name for o in scores if o.shape[:1] != (self.inputs.num_classes,)]
        if wrong:
            raise ValueError(
                f"outputs: expected {self.inputs.num_classes} classes on the first axis of scores, "
                f"got another number for {wrong}"
            )
        if self.inputs.num_classes is None and not self.outputs:
            raise ValueError("inputs.num_classes: expected a number for class scores, got none")
        return self

    def output_names(self, position: int) -> tuple[str, ...]:
        """Return a network's own names of the outputs; without `outputs` there are none."""
        return self.networks[position].outputs or tuple(output.name for output in self.outputs)

    @model_validator(mode="after")
    def _check_paths(self) -> OnnxConfig:
        """Raise `ValueError` for names that are not unique, and paths to missing cuts."""
        for field in ("name", "file"):
            values = [getattr(network, field) for network in self.networks]
            if len(set(values)) < len(values):
                raise ValueError(f"networks.{field}: expected each once, got {values}")
        for number, path in enumerate(self.paths):
            for side, cut in ((path.front, path.leave), (path.end, path.enter)):
                if side >= len(self.networks) or cut >= len(self.networks[side].cuts):
                    raise ValueError(
                        f"paths.{number}: expected a network and one of its cuts, got network "
                        f"{side} and cut {cut}"
                    )
        if len({path.layer for path in self.paths}) < len(self.paths):
            raise ValueError("paths: expected each path once")
        return self

    def stitches(self) -> tuple[Stitch, ...]:
        """Return every network: the given ones, then the stitched paths; ids are positions."""
        whole = [
            Stitch(
                position, (self._segment(position),), (), final_norm=True, given_name=network.name
            )
            for position, network in enumerate(self.networks)
        ]
        stitched = [
            Stitch(
                len(whole) + number,
                (
                    self._segment(path.front, last=path.leave),
                    self._segment(path.end, path.enter + 1),
                ),
                (path.layer,),
                final_norm=True,
                given_name=f"{self.networks[path.front].name}[..{path.leave}]"
                f"+{self.networks[path.end].name}[{path.enter + 1}..]",
            )
            for number, path in enumerate(self.paths)
        ]
        return (*whole, *stitched)

    def _segment(self, network: int, first: int = 0, last: int | None = None) -> Segment:
        return Segment(network, first, len(self.networks[network].cuts) if last is None else last)

    def route(self, stitch: Stitch) -> tuple[str, ...]:
        """Return the names of the units that a stitch runs, in order."""
        names = []
        for segment, layer in zip(stitch.segments, (*stitch.layers, None), strict=True):
            steps = range(segment.first, segment.last + 1)
            names += [f"network-{segment.anchor}-{step}" for step in steps]
            names += [layer] if layer is not None else []
        return tuple(names)

    def build(self) -> StitchedModel:
        """Raise `BundleError`: the networks of this family exist as ONNX graphs only."""
        raise_without_modules()

    def cost(self, stitch: Stitch) -> tuple[int, int]:
        """Return the multiply-accumulates for one image, and the parameters, of a stitch."""
        by_layer = {path.layer: path for path in self.paths}
        parts = [by_layer[layer] for layer in stitch.layers if layer is not None]
        macs, parameters = (
            sum(
                sum(getattr(self.networks[s.anchor], field)[s.first : s.last + 1])
                for s in stitch.segments
            )
            + sum(getattr(part, field) for part in parts)
            for field in ("macs", "parameters")
        )
        return macs, parameters


def raise_without_modules() -> NoReturn:
    """Raise `BundleError` for what needs the layers of a network as torch modules."""
    raise BundleError(
        "family: expected one with torch modules, got onnx; ONNX networks run in ONNX Runtime on "
        "CPUs and cannot be trained or quantised"
    )
