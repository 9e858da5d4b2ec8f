"""Configuration of a family of ONNX networks: the networks, their cuts, and the stitched paths.

Networks alone are a family without stitches. A path runs the front network up to one of its cuts,
an affine map, and the end network from one of its cuts. Everything but the weights is data here, so
that planning and counting read no network.
"""

from __future__ import annotations

from typing import Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ladderstitch.errors import BundleError
from ladderstitch.vision.models.route import Segment, Stitch
from ladderstitch.vision.models.stitched import StitchedModel

FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.onnx$"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class NetworkInputs(BaseModel):
    """Shape of the images that all networks take, and the number of scores that they return."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: Literal[1, 3] = 3
    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    num_classes: int = Field(gt=0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, [C, H, W]."""
        return self.in_channels, self.height, self.width


class NetworkEntry(BaseModel):
    """One network: its file, and its costs by steps, the parts between its cuts.

    `mean` and `std` are the network's own if they differ from those of the bundle; images are
    scaled from the one to the other before the first step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME)
    file: str = Field(pattern=FILE_NAME, description="in the folder `networks` of the bundle")
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    cuts: tuple[str, ...] = Field((), description="tensors between the steps, in order")
    macs: tuple[int, ...] = Field(description="multiply-accumulates of each step")
    parameters: tuple[int, ...] = Field(description="weights of each step")

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
    """Configuration of a family of ONNX networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["onnx"] = "onnx"
    inputs: NetworkInputs
    networks: tuple[NetworkEntry, ...] = Field(min_length=1, description="cheapest first")
    paths: tuple[StitchedPath, ...] = ()

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
