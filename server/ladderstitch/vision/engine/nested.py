"""Paths of a supernet as sessions of ONNX Runtime that share one set of weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
import onnxruntime

from ladderstitch.runtime.sessions import open_sliced_session
from ladderstitch.vision.engine.compiled_executor import (
    MAX_JOINED_SHARE,
    MIN_JOINED_BYTES,
    CompiledExecutor,
)
from ladderstitch.vision.models.nested.graphs import PREFIX, bound_names, path_file
from ladderstitch.vision.models.nested.model import NestedModel
from ladderstitch.vision.models.nested.slices import Slices


class NestedExecutor(CompiledExecutor):
    """The paths of a supernet, each as one session.

    If copies of the weights of all paths fit into the memory that `join` may spend, every path is
    opened with its copy: slices are computed once, batch normalisation is folded and weights are
    packed. Otherwise sessions compute their slices of the weights, which exist once, at each run,
    and `join` opens the most important paths again with copies, while the memory lasts.
    """

    def __init__(
        self, model: NestedModel, folder: Path, threads: int, copy_limit: float | None = None
    ) -> None:
        """Open the sessions of all paths, whose graphs are in `folder`, on `threads` threads.

        `copy_limit` is the number of bytes up to which all paths are copied; None: that of `join`.
        """
        self._folder, self._threads = folder, threads
        # Paths have no units in common, so that cascades restart from the images.
        self._routes = {stitch.id: () for stitch in model.stitches}
        self._units, self._parts = {}, {}
        tensors = model.state_dict()
        self._tensors = {
            PREFIX + name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        }
        self._kept = model  # the values above are its memory
        self.weight_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        self._copied_bytes = {s.id: 4 * _count_parameters(model, s.id) for s in model.stitches}
        limit = max(MIN_JOINED_BYTES, MAX_JOINED_SHARE * self.weight_bytes)
        limit = limit if copy_limit is None else copy_limit
        self.all_copied = sum(self._copied_bytes.values()) <= limit
        self._copies_left = limit
        self._sessions = {
            stitch.id: (self._open(stitch.id, copies=self.all_copied),) for stitch in model.stitches
        }

    def join(self, stitches: Iterable[int]) -> list[int]:
        """Open paths with copies of their weights, as `CompiledExecutor.join`; return which."""
        return list(stitches) if self.all_copied else super().join(stitches)

    def copied_bytes(self, stitch: int) -> int:
        """Return the bytes of a path's weights if they are copied."""
        return self._copied_bytes[stitch]

    def close(self) -> None:
        """Free the sessions and the weights now."""
        super().close()
        self._tensors.clear()
        del self._kept

    def _open_whole(self, stitch: int) -> tuple[onnxruntime.InferenceSession, ...]:
        return (self._open(stitch, copies=True),)

    def _open(self, stitch: int, *, copies: bool) -> onnxruntime.InferenceSession:
        graph = onnx.load(path_file(self._folder, stitch), load_external_data=False)
        values = {name: self._tensors[name] for name in bound_names(graph)}
        return open_sliced_session(graph.SerializeToString(), self._threads, values, copies=copies)


def _count_parameters(model: NestedModel, path: int) -> int:
    """Return the number of parameters of a path."""
    slices = Slices(model)
    model.plan(path, slices)
    return slices.parameters
