"""The change from the images of a bundle to those of one of its networks, as ONNX operators.

Networks of one family may have their own size, crop, mean and standard deviation. Images are
decoded once, for the bundle; each network crops, resizes and scales them before its first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ladderstitch.errors import BundleError
from ladderstitch.vision.models.graphs import INPUT, OUTPUT

RESIZE_OPSET = 11
"""Version of ONNX's operators from which images can be resized."""
ANTIALIAS_OPSET = 18
"""Version from which pixels are averaged where an image becomes smaller, as Pillow does."""
CUBIC = -0.5
"""Pillow's parameter of bicubic interpolation."""

Box = tuple[int, int, int, int]
"""Top, left, bottom and right edge in pixels."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """A change of images: the pixels in `box`, resized to `size`, times `factor` plus `shift`.

    Fields that are None change nothing. `resize` is bilinear or bicubic; it is bilinear, without
    averaging, with operators before `ANTIALIAS_OPSET`.
    """

    factor: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    box: Box | None = None
    size: tuple[int, int] | None = None
    resize: str = "bilinear"

    def nodes(self, source: str, target: str, opset: int) -> list[onnx.NodeProto]:
        """Return the operators from images `source` [B, C, H, W] to images `target`.

        Raises `BundleError` for operator versions without what is needed.
        """
        if (self.box or self.size) and opset < RESIZE_OPSET:
            raise BundleError(
                f"networks: expected operators of version {RESIZE_OPSET} or newer for images of "
                f"another size, got {opset}"
            )
        chain = _Chain(source)
        if self.box is not None:
            top, left, bottom, right = self.box
            ends = ([top, left], [bottom, right], [2, 3])
            chain.add("Slice", *(np.asarray(values, np.int64) for values in ends))
        if self.size is not None:
            self._resize(chain, self.size, opset)
        for operator, values in (("Mul", self.factor), ("Add", self.shift)):
            if values is not None:
                chain.add(operator, np.asarray(values, np.float32).reshape(1, -1, 1, 1))
        chain.nodes.append(helper.make_node("Identity", [chain.last], [target]))
        return chain.nodes

    def _resize(self, chain: _Chain, size: tuple[int, int], opset: int) -> None:
        """Add the operators that resize the last tensor; batch and channels stay as they are."""
        shape, kept = chain.name("shape"), chain.name("kept")
        chain.nodes.append(helper.make_node("Shape", [chain.last], [shape]))
        ends = [chain.constant(np.asarray([value], np.int64)) for value in (0, 2)]
        chain.nodes.append(helper.make_node("Slice", [shape, *ends], [kept]))
        sides, sizes = chain.constant(np.asarray(size, np.int64)), chain.name("sizes")
        chain.nodes.append(helper.make_node("Concat", [kept, sides], [sizes], axis=0))
        options: dict[str, Any] = {"mode": "linear"}
        if opset >= ANTIALIAS_OPSET:
            # Without averaging, ONNX Runtime takes 35 times as long for bicubic interpolation.
            if self.resize == "bicubic":
                options = {"mode": "cubic", "cubic_coeff_a": CUBIC}
            options |= {"antialias": 1, "exclude_outside": 1}
        none = np.zeros(0, np.float32)
        chain.add("Resize", none, none, sizes, **options)

    def model(self, like: onnx.ModelProto, opset: int) -> onnx.ModelProto:
        """Return the change as a graph from `x` to `y`, with the operator versions of `like`."""
        x, y = (
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in ((INPUT, ["batch", "channels", "height", "width"]), (OUTPUT, None))
        )
        graph = helper.make_graph(self.nodes(INPUT, OUTPUT, opset), "scaling", [x], [y])
        return helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)


class _Chain:
    """Operators one after another; `last` is the name of the last tensor."""

    def __init__(self, source: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.last = source
        self._count = 0

    def name(self, kind: str) -> str:
        """Return a new name of a tensor."""
        self._count += 1
        return f"scaling/{kind}-{self._count}"

    def constant(self, value: np.ndarray) -> str:
        """Add a constant, and return its name."""
        name = self.name("constant")
        tensor = numpy_helper.from_array(value)
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def add(self, operator: str, *inputs: np.ndarray | str, **attributes: Any) -> None:
        """Apply an operator to the last tensor."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        name = self.name(operator.lower())
        node = helper.make_node(operator, [self.last, *names], [name], **attributes)
        self.nodes.append(node)
        self.last = name


def scaling_between(
    given: tuple[tuple[float, ...], tuple[float, ...]],
    own: tuple[tuple[float, ...], tuple[float, ...]],
    *,
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1)),
    share: float = 1.0,
    resize: str = "bilinear",
) -> Scaling | None:
    """Return the change from images of one mean and standard deviation to those of others.

    `sizes` are height and width of both; `share` is the side of the centred part that is kept. It
    is rounded to pixels that can be removed on both sides. None if nothing changes.
    """
    (height, width), target = sizes
    margins = [round(side * (1 - share) / 2) for side in (height, width)]
    kept = (height - 2 * margins[0], width - 2 * margins[1])
    factor = shift = None
    if given != own:
        pairs = list(zip(*given, *own, strict=True))
        factor = tuple(std0 / std1 for _, std0, _, std1 in pairs)
        shift = tuple((mean0 - mean1) / std1 for mean0, _, mean1, std1 in pairs)
    box = (margins[0], margins[1], margins[0] + kept[0], margins[1] + kept[1])
    change = Scaling(
        factor,
        shift,
        box if any(margins) else None,
        target if target != kept else None,
        resize,
    )
    return None if change == Scaling(resize=resize) else change
