"""Paths of a supernet as sessions of ONNX Runtime that share one set of weights."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime

from ladderstitch.runtime.sessions import open_sliced_session
from ladderstitch.vision.engine.compiled import CompiledExecutor
from ladderstitch.vision.models.nested.graphs import PREFIX, bound_names, path_file
from ladderstitch.vision.models.nested.model import NestedModel
from ladderstitch.vision.models.nested.slices import Slices


class NestedExecutor(CompiledExecutor):
    """The paths of a supernet, each as one session, on tensors that exist once.

    A session computes its slices of the weights at each run, without packed copies of weights.
    `join` opens paths again with copies: slices are computed once, batch normalisation is folded
    and weights are packed, which takes less time, while the memory for copies lasts.
    """

    def __init__(self, model: NestedModel, folder: Path, threads: int) -> None:
        """Open the sessions of all paths, whose graphs are in `folder`, on `threads` threads."""
        self._folder, self._threads = folder, threads
        self._tensors = {
            PREFIX + name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point()
        }
        self._kept = model  # the values above are its memory
        self._copied_bytes: dict[int, int] = {}
        for stitch in model.stitches:
            slices = Slices(model)
            model.plan(stitch.id, slices)
            self._copied_bytes[stitch.id] = 4 * slices.parameters
        self._sessions = {
            stitch.id: (self._open(stitch.id, copies=False),) for stitch in model.stitches
        }
        tensors = model.state_dict().values()
        self.weight_bytes = sum(t.numel() * t.element_size() for t in tensors)

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
