"""Text streams of `tritonclient`, unmodified, which `test_generation.py` runs in another process.

Prints the results as JSON.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

WAIT_S = 300


def text_input(prompt: str) -> triton.InferInput:
    """Return an input tensor that holds a prompt."""
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([prompt.encode()], dtype=object))
    return tensor


def probe(address: str) -> dict[str, Any]:
    """Send three requests on one stream and return the results."""
    client = triton.InferenceServerClient(address)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(
        "tiny", [text_input("a prompt of bytes")], request_id="first", parameters={"max_tokens": 6}
    )
    client.async_stream_infer(
        "tiny",
        [text_input("another")],
        request_id="second",
        parameters={
            "max_tokens": 3,
            "temperature": "0.5",
            "seed": 1,
            "latency_budget_us": 9_000_000,
        },
    )
    client.async_stream_infer("tiny", [text_input("")], request_id="empty")
    tokens: dict[str, list[int]] = {"first": [], "second": []}
    finals: dict[str, dict[str, Any]] = {}
    errors = []
    while len(finals) + len(errors) < 3:
        result, error = answers.get(timeout=WAIT_S)
        if error is not None:
            errors.append(error.message())
            continue
        response = result.get_response()
        tokens[response.id].append(int(result.as_numpy("token_id")[0]))
        parameters = {
            name: getattr(value, value.WhichOneof("parameter_choice"))
            for name, value in response.parameters.items()
        }
        if parameters["triton_final_response"]:
            finals[response.id] = parameters
    client.stop_stream()
    return {
        "tokens": tokens,
        "finals": finals,
        "errors": errors,
        "metadata": client.get_model_metadata("tiny", as_json=True),
        "config": client.get_model_config("tiny", as_json=True),
    }


if __name__ == "__main__":
    json.dump(probe(sys.argv[1]), sys.stdout)
