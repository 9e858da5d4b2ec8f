"""The model of Triton's Python backend: a session of ONNX Runtime for whole batches.

Triton runs a copy of this file in an interpreter of its own, which ignores PYTHONPATH. The
environment variable LADDERSTITCH_PEERS therefore names the folder of its packages, which come
before those that the machine has.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ["LADDERSTITCH_PEERS"])

import numpy as np
import onnxruntime
import triton_python_backend_utils as backend  # type: ignore[import-not-found] # Triton has it

INPUT, OUTPUT = "images", "logits"


class TritonPythonModel:
    """The model class, whose name and methods Triton prescribes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session, with one thread as in `ladderstitch serve`."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response per request, computed in one run."""
        images = [backend.get_input_tensor_by_name(one, INPUT).as_numpy() for one in requests]
        batch = images[0] if len(images) == 1 else np.concatenate(images)
        (logits,) = self.session.run((OUTPUT,), {INPUT: batch})
        ends = np.cumsum([len(one) for one in images])
        return [
            backend.InferenceResponse([backend.Tensor(OUTPUT, logits[end - len(one) : end])])
            for one, end in zip(images, ends, strict=True)
        ]
