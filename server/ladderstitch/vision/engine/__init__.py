"""Engines of image models: one batch on one stitch, in ONNX Runtime or in a worker process."""

import os

# ONNX Runtime reads it when it is imported; it would send its use to its makers otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
