"""Serve elastic models under latency budgets.

One set of weights holds many networks, the variants of a model. The server answers every request
with the most accurate variant that meets the request's latency budget.
"""

import os

# ONNX Runtime would send telemetry from a thread, and leave a file in the temporary directory.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
