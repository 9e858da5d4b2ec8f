"""The nested family: its configuration, and the model whose paths share one set of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ladderstitch.vision.models.nested.attentive_nas import AttentiveNas
from ladderstitch.vision.models.nested.autoformer import AutoFormer
from ladderstitch.vision.models.nested.ofa_mobilenet import OfaMobileNet
from ladderstitch.vision.models.nested.ofa_resnet import OfaResNet
from ladderstitch.vision.models.nested.path_statistics import PathStatistics
from ladderstitch.vision.models.nested.resize import resize_images
from ladderstitch.vision.models.nested.sizes import build_tree
from ladderstitch.vision.models.nested.slices import (
    BatchSlices,
    MeasuringSlices,
    Plan,
    Slices,
    WidthSlices,
)
from ladderstitch.vision.models.nested.thinking_vit import ThinkingVit
from ladderstitch.vision.models.nested.vit_resnas import VitResnas
from ladderstitch.vision.models.route import Segment, Stitch
from ladderstitch.vision.models.vit import InputShape

Net = Annotated[
    OfaResNet | OfaMobileNet | AutoFormer | ThinkingVit | VitResnas | AttentiveNas,
    Field(discriminator="kind"),
]
"""A supernet's layout, its sizes and its listed paths."""


class NestedConfig(BaseModel):
    """Configuration of a nested family: a supernet and a finite list of its networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["nested"] = "nested"
    inputs: InputShape
    net: Net

    @model_validator(mode="after")
    def _check(self) -> NestedConfig:
        """Raise `ValueError` if two paths have one name, or for images that the net cannot take."""
        self.net.sizes(self.inputs)
        names = [stitch.given_name for stitch in self.stitches()]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"net.paths.name: expected different names, got {sorted(repeated)}")
        return self

    def stitches(self) -> tuple[Stitch, ...]:
        """Return every listed network; a network's id is its position in the list."""
        return tuple(
            Stitch(
                id=number,
                segments=(Segment(0, 0, 0),),
                layers=(),
                final_norm=True,
                given_name=path.name or f"path-{number}",
                nested=True,
            )
            for number, path in enumerate(self.net.paths)
        )

    def image_size(self, path: int) -> int:
        """Return the side in pixels of the images that a path sees, whatever requests send."""
        return self.net.paths[path].image_size or self.inputs.image_size

    def with_paths(self, paths: Iterable[Mapping[str, Any]]) -> NestedConfig:
        """Return the family with other paths, given by their fields; raises `ValidationError`."""
        fields = self.model_dump()
        fields["net"]["paths"] = list(paths)
        return NestedConfig.model_validate(fields)

    def build(self) -> NestedModel:
        """Return the model before training, on torch's default device."""
        return NestedModel(self)


class NestedModel(nn.Module):
    """A supernet; `forward` takes the path as an argument, and its weights are slices.

    State-dict keys are the published ones. `statistics` holds those of batch normalisation by
    path; a path without any reads the supernet's own. In training mode, batches are normalised with
    their own statistics. Calls with different paths share every weight and no state in eval mode.
    """

    def __init__(self, config: NestedConfig) -> None:
        super().__init__()
        self.config, self.stitches = config, config.stitches()
        sizes = config.net.sizes(config.inputs)
        self.norm_names = sizes.path_norms
        tree = build_tree(sizes)
        for name, child in tree.named_children():
            self.add_module(name, child)
        for name, parameter in tree.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.statistics = PathStatistics()

    def plan(self, path: int, slices: Slices | None = None) -> Plan:
        """Return the functions of the path with this id, on views of the weights.

        Raises `KeyError` for an id that the family does not have.
        """
        if not 0 <= path < len(self.stitches):
            raise KeyError(path)
        net: Any = self.config.net
        if slices is None:
            stored = partial(self.statistics.__getitem__, path)
            slices = Slices(self, stored if path in self.statistics else None)
        inputs, side = self.config.inputs, self.config.image_size(path)
        own = inputs.model_copy(update={"image_size": side})
        plan: Plan = net.plan(net.paths[path], slices, own)
        return plan if own == inputs else resize_images(plan, inputs.image_size, side)

    def forward(self, images: Tensor, stitch: int) -> Tensor:
        """Return the logits [B, num_classes] of images [B, C, H, W] on the path with this id."""
        plan = self.plan(stitch, BatchSlices(self) if self.training else None)
        return plan(images)

    def fold_batch_norm(self) -> None:
        """Do nothing: folded weights would be a copy for each path."""

    def recalibrate(self, path: int, batches: Iterable[Tensor]) -> None:
        """Set a path's statistics of batch normalisation from batches [B, C, H, W] of images."""
        if not self.norm_names:
            return
        slices = MeasuringSlices(self)
        plan = self.plan(path, slices)
        with torch.no_grad():
            for batch in batches:
                plan(batch)
        self.statistics[path] = slices.averages()

    def norm_widths(self, path: int) -> dict[str, int]:
        """Return the active channels of a path's own batch normalisations, by their names."""
        slices = WidthSlices(self)
        self.plan(path, slices)
        return {name: slices.widths[name] for name in slices.widths if name in self.norm_names}

    def _apply(self, fn: Any, recurse: bool = True) -> NestedModel:
        """Move or convert the paths' statistics together with the weights."""
        super()._apply(fn, recurse)
        self.statistics.convert(fn)
        return self
