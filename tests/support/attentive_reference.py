"""AttentiveNAS once more, in plain modules and without the server's code, to compare with.

Written from the layout of the original: a checkpoint under its names with random numbers, and each
network of it as modules of its own size, whose weights are copied out of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Space = Mapping[str, Any]
Tensors = Mapping[str, Tensor]

SPACE: dict[str, Any] = {
    "use_v3_head": True,
    "resolutions": [12, 16, 22],
    "first_conv": {"c": [8, 16], "act_func": "swish", "s": 2},
    "mb1": {"c": [8, 16], "d": [1, 2], "k": [3, 5], "t": [1], "s": 1, "se": True},
    "mb2": {"c": [16, 24], "d": [1, 2, 3], "k": [3, 5, 7], "t": [2, 3], "s": 2, "se": False},
    "mb3": {"c": [24, 32], "d": [2], "k": [3], "t": [4, 6], "s": 2, "se": True},
    "mb4": {"c": [24, 40], "d": [1, 2], "k": [3, 5], "t": [6], "s": 1, "se": True},
    "last_conv": {"c": [48, 64], "act_func": "swish"},
}
for _name in ("mb1", "mb2", "mb3", "mb4"):
    SPACE[_name]["act_func"] = "swish"
IN_CHANNELS, CLASSES, IMAGE_SIZE = 2, 5, 16


def stages_of(space: Space) -> list[Mapping[str, Any]]:
    """Return the stages of a search space."""
    return [fields for name, fields in space.items() if name.startswith("mb")]


def divisible(value: int) -> int:
    """Return the original's width of squeezed channels: a multiple of 8, or 1."""
    near = max(1, (value + 4) // 8 * 8)
    return near + 8 if near < 0.9 * value else near


def make_checkpoint(space: Space, channels: int = IN_CHANNELS, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors of a supernet under the names of the original."""
    rng, tensors = torch.Generator().manual_seed(seed), {}

    def add(name: str, *size: int) -> None:
        spread = (size[1] * (size[2] if len(size) > 2 else 1) ** 2) ** -0.5
        tensors[f"{name}.weight"] = spread * torch.randn(size, generator=rng)

    def add_norm(name: str, width: int) -> None:
        for part in ("bn", "bn_tracking.0", "bn_tracking.1"):
            tensors[f"{name}.{part}.running_mean"] = 0.3 * torch.randn(width, generator=rng)
            tensors[f"{name}.{part}.running_var"] = 0.5 + torch.rand(width, generator=rng)
            tensors[f"{name}.{part}.num_batches_tracked"] = torch.tensor(3)
        tensors[f"{name}.bn.weight"] = 0.5 + torch.rand(width, generator=rng)
        tensors[f"{name}.bn.bias"] = 0.3 * torch.randn(width, generator=rng)

    width = max(space["first_conv"]["c"])
    add("first_conv.conv.conv", width, channels, 3, 3)
    add_norm("first_conv.bn", width)
    number = 0
    for stage in stages_of(space):
        for _ in range(max(stage["d"])):
            middle, outputs = width * max(stage["t"]), max(stage["c"])
            name = f"blocks.{number}.mobile_inverted_conv"
            if max(stage["t"]) > 1:
                add(f"{name}.inverted_bottleneck.conv.conv", middle, width, 1, 1)
                add_norm(f"{name}.inverted_bottleneck.bn", middle)
            add(f"{name}.depth_conv.conv.conv", middle, 1, max(stage["k"]), max(stage["k"]))
            add_norm(f"{name}.depth_conv.bn", middle)
            if stage["se"]:
                few = divisible(middle // 4)
                for part, rows, columns in (("reduce", few, middle), ("expand", middle, few)):
                    add(f"{name}.depth_conv.se.fc.{part}", rows, columns, 1, 1)
                    bias = torch.randn(rows, generator=rng)
                    tensors[f"{name}.depth_conv.se.fc.{part}.bias"] = bias
            add(f"{name}.point_linear.conv.conv", outputs, middle, 1, 1)
            add_norm(f"{name}.point_linear.bn", outputs)
            add(f"blocks.{number}.shortcut.conv.conv", outputs, width, 1, 1)
            width, number = outputs, number + 1
    last = max(space["last_conv"]["c"])
    if space["use_v3_head"]:
        add("last_conv.final_expand_layer.conv.conv", 6 * width, width, 1, 1)
        add_norm("last_conv.final_expand_layer.bn", 6 * width)
        add("last_conv.feature_mix_layer.conv.conv", last, 6 * width, 1, 1)
    else:
        add("last_conv.conv.conv", last, width, 1, 1)
        add_norm("last_conv.bn", last)
    add("classifier.linear.linear", CLASSES, last)
    tensors["classifier.linear.linear.bias"] = torch.randn(CLASSES, generator=rng)
    return tensors


class Network(nn.Module):
    """One network of a supernet, with copies of its weights; in eval mode at first."""

    def __init__(self, tensors: Tensors, space: Space, path: Mapping[str, Any]) -> None:
        super().__init__()
        self.tensors, self.resolution = tensors, path["resolution"]
        width, *widths, last = path["width"]
        channels = tensors["first_conv.conv.conv.weight"].shape[1]
        first = self._conv("first_conv.conv.conv", channels, width, 3, stride=2)
        self.first = nn.Sequential(first, self._norm("first_conv.bn", width), nn.SiLU())
        blocks, number = [], 0
        for position, stage in enumerate(stages_of(space)):
            for index in range(path["depth"][position]):
                kernel, ratio = path["kernel_size"][position], path["expand_ratio"][position]
                outputs, stride = widths[position], stage["s"] if index == 0 else 1
                blocks.append(
                    self._block(
                        f"blocks.{number + index}", stage, width, outputs, kernel, ratio, stride
                    )
                )
                width = outputs
            number += max(stage["d"])
        self.blocks = nn.Sequential(*blocks)
        name, pool = "last_conv", nn.AdaptiveAvgPool2d(1)
        if space["use_v3_head"]:
            expand, mix = f"{name}.final_expand_layer", f"{name}.feature_mix_layer.conv.conv"
            self.last = nn.Sequential(
                self._conv(f"{expand}.conv.conv", width, 6 * width),
                self._norm(f"{expand}.bn", 6 * width),
                nn.SiLU(),
                pool,
                self._conv(mix, 6 * width, last),
                nn.SiLU(),
            )
        else:
            convolve = self._conv(f"{name}.conv.conv", width, last)
            self.last = nn.Sequential(convolve, self._norm(f"{name}.bn", last), nn.SiLU(), pool)
        weight = tensors["classifier.linear.linear.weight"]
        self.classifier = nn.Linear(last, CLASSES)
        self.classifier.weight.data.copy_(weight[:, :last])
        self.classifier.bias.data.copy_(tensors["classifier.linear.linear.bias"])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images of any size."""
        if images.shape[-1] != self.resolution:
            images = F.interpolate(images, size=self.resolution, mode="bicubic")
        return self.classifier(self.last(self.blocks(self.first(images))).flatten(1))

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics of batch normalisation to the averages over batches of one size."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        counts: dict[nn.Module, int] = {}
        hooks = [
            norm.register_forward_pre_hook(
                lambda module, inputs: counts.update({module: inputs[0][:, 0].numel()})
            )
            for norm in norms
        ]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # plain averages
            norm.train()
        for batch in batches:
            self(batch)
        self.eval()
        for norm, hook in zip(norms, hooks, strict=True):
            hook.remove()
            norm.running_var *= (counts[norm] - 1) / counts[norm]  # biased, as the server's is

    def _block(
        self,
        name: str,
        stage: Mapping[str, Any],
        inputs: int,
        outputs: int,
        kernel: int,
        ratio: int,
        stride: int,
    ) -> nn.Module:
        middle, body = inputs * ratio, f"{name}.mobile_inverted_conv"
        layers: list[nn.Module] = []
        if max(stage["t"]) > 1:
            up = f"{body}.inverted_bottleneck"
            layers += [self._conv(f"{up}.conv.conv", inputs, middle)]
            layers += [self._norm(f"{up}.bn", middle), nn.SiLU()]
        deep = f"{body}.depth_conv"
        depthwise = nn.Conv2d(
            middle, middle, kernel, stride, kernel // 2, groups=middle, bias=False
        )
        weight = self.tensors[f"{deep}.conv.conv.weight"]
        centre, reach = weight.shape[-1] // 2, kernel // 2
        inner = slice(centre - reach, centre + reach + 1)
        depthwise.weight.data.copy_(weight[:middle, :, inner, inner])
        layers += [depthwise, self._norm(f"{deep}.bn", middle), nn.SiLU()]
        if stage["se"]:
            few = divisible(middle // 4)
            reduce = self._conv(f"{deep}.se.fc.reduce", middle, few, bias=True)
            expand = self._conv(f"{deep}.se.fc.expand", few, middle, bias=True)
            gate = nn.Sequential(reduce, nn.ReLU(), expand)
            layers += [Excitation(gate)]
        layers += [self._conv(f"{body}.point_linear.conv.conv", middle, outputs)]
        layers += [self._norm(f"{body}.point_linear.bn", outputs)]
        convolve = None
        if inputs != outputs:
            convolve = self._conv(f"{name}.shortcut.conv.conv", inputs, outputs)
        return Residual(nn.Sequential(*layers), convolve, stride)

    def _conv(
        self,
        name: str,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        bias: bool = False,
    ) -> nn.Conv2d:
        weight = self.tensors[f"{name}.weight"][:outputs, :inputs]
        outputs, inputs = weight.shape[:2]  # a checkpoint may have fewer than were asked for
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
        conv.weight.data.copy_(weight)
        if conv.bias is not None:
            conv.bias.data.copy_(self.tensors[f"{name}.bias"][:outputs])
        return conv

    def _norm(self, name: str, width: int) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(width)
        for part in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, part).data.copy_(self.tensors[f"{name}.bn.{part}"][:width])
        return norm


class Excitation(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps, scaled per channel."""
        return x * (F.relu6(self.gate(x.mean((2, 3), keepdim=True)) + 3) / 6)


class Residual(nn.Module):
    """A block and its shortcut."""

    def __init__(self, body: nn.Module, convolve: nn.Module | None, stride: int) -> None:
        super().__init__()
        self.body, self.convolve, self.stride = body, convolve, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        short = x
        if self.stride > 1:
            short = F.avg_pool2d(x, self.stride, padding=0 if x.shape[-1] % 2 == 0 else 1)
        if self.convolve is not None:
            short = self.convolve(short)
        return self.body(x) + short


def extreme_path(space: Space, chosen: Any) -> dict[str, Any]:
    """Return the smallest (`min`) or the largest (`max`) network."""
    stages = stages_of(space)
    ends = (space["first_conv"], *stages, space["last_conv"])
    return {
        "resolution": chosen(space["resolutions"]),
        "width": [chosen(part["c"]) for part in ends],
        "kernel_size": [chosen(stage["k"]) for stage in stages],
        "expand_ratio": [chosen(stage["t"]) for stage in stages],
        "depth": [chosen(stage["d"]) for stage in stages],
    }


def single_changes(space: Space) -> list[dict[str, Any]]:
    """Return the largest network and all that differ from it in one choice."""
    largest, stages = extreme_path(space, max), stages_of(space)
    ends = (space["first_conv"], *stages, space["last_conv"])
    lists = {
        "width": [part["c"] for part in ends],
        "kernel_size": [stage["k"] for stage in stages],
        "expand_ratio": [stage["t"] for stage in stages],
        "depth": [stage["d"] for stage in stages],
    }
    paths = [largest | {"resolution": side} for side in space["resolutions"]]
    for field, choices in lists.items():
        for position, values in enumerate(choices):
            for value in values:
                if value != largest[field][position]:
                    changed = [*largest[field]]
                    changed[position] = value
                    paths.append(largest | {field: changed})
    return paths
