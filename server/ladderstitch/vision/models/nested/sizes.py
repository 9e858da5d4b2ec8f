"""Names and sizes of a supernet's tensors, and the module that holds them before training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-5
MOMENTUM = 0.1

Size = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSizes:
    """Sizes of a supernet's parameters by name, and the widths of its batch normalisations.

    `norms_are_shared` states that all paths normalise the same maps, so that the supernet's own
    statistics are those of every path.
    """

    parameters: dict[str, Size] = field(default_factory=dict)
    norms: dict[str, int] = field(default_factory=dict)
    norms_are_shared: bool = False

    @property
    def path_norms(self) -> tuple[str, ...]:
        """Names of the batch normalisations of which every path needs statistics of its own."""
        return () if self.norms_are_shared else tuple(self.norms)

    def add(self, name: str, *size: int) -> None:
        """Add one parameter."""
        self.parameters[name] = size

    def add_linear(self, name: str, outputs: int, inputs: int) -> None:
        """Add a linear layer with bias."""
        self.add(f"{name}.weight", outputs, inputs)
        self.add(f"{name}.bias", outputs)

    def add_layer_norm(self, name: str, width: int) -> None:
        """Add layer normalisation."""
        self.add(f"{name}.weight", width)
        self.add(f"{name}.bias", width)

    def add_conv(self, name: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        """Add a convolution without bias, and the batch normalisation of its outputs."""
        self.add(f"{name}.weight", outputs, inputs, kernel, kernel)
        self.norms[norm] = outputs


def build_tree(sizes: TensorSizes) -> nn.Module:
    """Return a module whose state dict has these names, on torch's default device."""
    root = nn.Module()
    for name, width in sizes.norms.items():
        parent, leaf = _parent_of(root, name)
        parent.add_module(leaf, nn.BatchNorm2d(width, BATCH_NORM_EPS, MOMENTUM))
    for name, size in sizes.parameters.items():
        parent, leaf = _parent_of(root, name)
        parent.register_parameter(leaf, nn.Parameter(_initial(name, size)))
    return root


def _parent_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a name's last part; modules that do not exist are added."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, leaf


def _initial(name: str, size: Size) -> Tensor:
    """Return a parameter before training: identities for kernel transforms, small numbers else."""
    values = torch.empty(size)
    if name.endswith("_matrix"):
        return nn.init.eye_(values)
    if len(size) == 4:
        fan_out = size[0] * size[2] * size[3] / (size[0] if size[1] == 1 else 1)
        return nn.init.normal_(values, std=math.sqrt(2 / fan_out))
    if len(size) == 1:
        is_scale = name.endswith("weight")
        return nn.init.ones_(values) if is_scale else nn.init.zeros_(values)
    return nn.init.trunc_normal_(values, std=0.02)


def make_divisible(value: float, divisor: int = 8, least: int = 8) -> int:
    """Return the multiple of `divisor` next to a width, at least `least`, never over 10 % below."""
    rounded = max(least, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
