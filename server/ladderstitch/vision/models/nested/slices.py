"""Tensors of a supernet under their published names, and the slices of them that a path reads.

A slice is a view: a path needs no memory of its own for weights. Only its statistics of batch
normalisation belong to the path alone (`path_statistics.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderstitch.vision.models.nested.sizes import BATCH_NORM_EPS, MOMENTUM

Step = Callable[[Tensor], Tensor]
"""Function from the features before a step to those after it."""
Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and variance per active channel, by the name of the batch normalisation."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The functions that a path runs, in order: images -> features -> ... -> logits."""

    embed: Step
    blocks: tuple[Step, ...]
    classify: Step

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, C, H, W]."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


class Slices:
    """Prefixes of a supernet's tensors, and batch normalisation with stored statistics.

    `statistics` returns those of the path, at each call of a step; without it the supernet's own
    are read, the first channels of each. Counts the parameters that were read in `parameters`.
    """

    def __init__(self, tree: nn.Module, statistics: Callable[[], Statistics] | None = None) -> None:
        self._tree, self._statistics = tree, statistics
        self._counted: dict[str, int] = {}

    @property
    def parameters(self) -> int:
        """Number of parameters that the slices taken so far hold together."""
        return sum(self._counted.values())

    def take(self, name: str, *sizes: int | None) -> Tensor:
        """Return the first `sizes` entries along each axis of a parameter; None takes all."""
        tensor: Tensor = self._tree.get_parameter(name)
        for axis, size in enumerate(sizes):
            if size is not None and size < tensor.shape[axis]:
                tensor = _first(tensor, axis, size)
        self._count(name, tensor.numel())
        return tensor

    def rows(self, name: str, first: int, count: int, inputs: int) -> tuple[Tensor, Tensor]:
        """Return weight [count, inputs] and bias [count] of a linear layer's rows from `first`."""
        weight = self._tree.get_parameter(f"{name}.weight").narrow(0, first, count)
        bias = self._tree.get_parameter(f"{name}.bias").narrow(0, first, count)
        self._count(f"{name}[{first}]", count * inputs + count)
        return weight[:, :inputs], bias

    def _count(self, name: str, number: int) -> None:
        self._counted[name] = max(number, self._counted.get(name, 0))

    def linear(self, name: str, outputs: int | None, inputs: int | None) -> Step:
        """Return the map [.., inputs] -> [.., outputs] of a linear layer's prefix."""
        weight, bias = (
            self.take(f"{name}.weight", outputs, inputs),
            self.take(f"{name}.bias", outputs),
        )
        return lambda x: F.linear(x, weight, bias)

    def layer_norm(self, name: str, width: int, eps: float) -> Step:
        """Return layer normalisation over the first `width` channels."""
        weight, bias = self.take(f"{name}.weight", width), self.take(f"{name}.bias", width)
        return lambda x: F.layer_norm(x, (width,), weight, bias, eps)

    def batch_norm(self, name: str, width: int) -> Step:
        """Return batch normalisation of maps [B, width, h, w]."""
        weight, bias = self.take(f"{name}.weight", width), self.take(f"{name}.bias", width)
        stored = self._statistics
        if stored is not None:

            def normalise(x: Tensor) -> Tensor:
                mean, variance = stored()[name]
                return F.batch_norm(x, mean, variance, weight, bias, eps=BATCH_NORM_EPS)

            return normalise
        mean = self._tree.get_buffer(f"{name}.running_mean")[:width]
        variance = self._tree.get_buffer(f"{name}.running_var")[:width]
        return lambda x: F.batch_norm(x, mean, variance, weight, bias, eps=BATCH_NORM_EPS)

    def conv_norm(
        self,
        name: str,
        norm: str,
        outputs: int | None = None,
        inputs: int | None = None,
        stride: int = 1,
    ) -> Step:
        """Return a convolution's prefix, without bias, and the batch normalisation after it."""
        weight = self.take(f"{name}.weight", outputs, inputs)
        padding = weight.shape[-1] // 2
        normalise = self.batch_norm(norm, weight.shape[0])
        return lambda x: normalise(F.conv2d(x, weight, None, stride, padding))

    def depthwise_norm(
        self, kernels: Callable[[], Tensor], norm: str, channels: int, stride: int = 1
    ) -> Step:
        """Return a depthwise convolution, whose kernels are computed, and its normalisation."""
        normalise = self.batch_norm(norm, channels)

        def convolve(x: Tensor) -> Tensor:
            weight = kernels()
            return normalise(
                F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=channels)
            )

        return convolve


class BatchSlices(Slices):
    """Slices that normalise with each batch's statistics and update the supernet's, to train."""

    def batch_norm(self, name: str, width: int) -> Step:
        """Return batch normalisation of maps [B, width, h, w] in training mode."""
        weight, bias = self.take(f"{name}.weight", width), self.take(f"{name}.bias", width)
        mean = self._tree.get_buffer(f"{name}.running_mean")[:width]
        variance = self._tree.get_buffer(f"{name}.running_var")[:width]
        eps = BATCH_NORM_EPS
        return lambda x: F.batch_norm(x, mean, variance, weight, bias, True, MOMENTUM, eps)


class WidthSlices(Slices):
    """Slices that note the width of every batch normalisation, in `widths`."""

    def __init__(self, tree: nn.Module) -> None:
        super().__init__(tree)
        self.widths: dict[str, int] = {}

    def batch_norm(self, name: str, width: int) -> Step:
        """Note the width."""
        self.widths[name] = width
        return super().batch_norm(name, width)


class MeasuringSlices(Slices):
    """Slices that normalise with each batch's statistics and average them, to recalibrate.

    The averages are weighted by the batches' sizes; the variance is the average of the batches'
    biased variances, not that of all images together (`set_running_statistics` of once-for-all).
    """

    def __init__(self, tree: nn.Module) -> None:
        super().__init__(tree)
        self._totals: dict[str, tuple[int, Tensor, Tensor]] = {}

    def batch_norm(self, name: str, width: int) -> Step:
        """Return batch normalisation that notes the statistics of its input."""
        weight, bias = self.take(f"{name}.weight", width), self.take(f"{name}.bias", width)

        def normalise(x: Tensor) -> Tensor:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            count, means, variances = self._totals.get(
                name, (0, torch.zeros_like(mean), torch.zeros_like(variance))
            )
            size = len(x)
            self._totals[name] = (count + size, means + size * mean, variances + size * variance)
            return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, BATCH_NORM_EPS)

        return normalise

    def averages(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the mean and the variance of every normalisation that was passed."""
        return {
            name: (means / count, variances / count)
            for name, (count, means, variances) in self._totals.items()
        }


def _first(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return a view of the first entries along an axis.

    `narrow` is the same, but becomes nine nodes of a graph instead of one.
    """
    view: Tensor = torch.ops.aten.slice.Tensor(tensor, axis, 0, size)
    return view
