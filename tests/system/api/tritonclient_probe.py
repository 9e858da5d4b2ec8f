"""Calls of `tritonclient`, unmodified, which `test_oip.py` runs in a separate process.

The stubs of `tritonclient` and of this package cannot be loaded in one process. Prints the results
as JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def probe(address: str) -> dict[str, object]:
    """Call every method and return the results."""
    client = triton.InferenceServerClient(address)
    seen: dict[str, object] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("tiny", "1"),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata("tiny", as_json=True),
        "config": client.get_model_config("tiny", as_json=True),
        "index": client.get_model_repository_index(as_json=True),
    }
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8)).astype(np.uint8)
    tensor = triton.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    floats = triton.InferInput("images", list(images.shape), "FP32")
    floats.set_data_from_numpy(((images / 255 - 0.5) / 0.25).astype(np.float32))

    plain = client.infer("tiny", [tensor], request_id="abc", parameters={"variant_id": 5})
    same = client.infer("tiny", [floats], parameters={"variant_id": 5})
    seen["id"] = plain.get_response().id
    seen["agree"] = bool(np.allclose(plain.as_numpy("logits"), same.as_numpy("logits"), atol=1e-5))
    seen["logits"] = plain.as_numpy("logits").tolist()

    outputs = [triton.InferRequestedOutput(n) for n in ("logits", "probabilities", "labels")]
    asked = client.infer(
        "tiny",
        [tensor],
        outputs=outputs,
        timeout=9_000_000,
        priority=3,
        parameters={"latency_budget_us": 5_000_000},
    )
    seen["sums"] = asked.as_numpy("probabilities").sum(1).tolist()
    seen["labels"] = [label.decode() for label in asked.as_numpy("labels")]
    seen["parameters"] = {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in asked.get_response().parameters.items()
    }

    def failure(**options: object) -> list[str]:
        try:
            client.infer("tiny", [tensor], **options)
        except InferenceServerException as error:
            return [str(error.status()), error.message()]
        return ["OK", ""]

    seen["hard"] = failure(timeout=10)
    seen["client_timeout"] = failure(client_timeout=-1.0)
    seen["bad_parameter"] = failure(parameters={"min_qualty": 1})
    seen["own_parameter"] = failure(
        parameters={"customer": "a"}, sequence_id=7, sequence_start=True
    )
    best = triton.InferRequestedOutput("logits", class_count=3)
    seen["classes"] = [
        [value.decode() for value in row]
        for row in client.infer(
            "tiny", [tensor], outputs=[best], parameters={"variant_id": 5}
        ).as_numpy("logits")
    ]
    shared = triton.InferRequestedOutput("logits")
    shared.set_shared_memory("region", 1000)
    seen["shared_memory"] = failure(outputs=[shared])
    seen["regions"] = client.get_system_shared_memory_status(as_json=True)
    seen["trace"] = client.get_trace_settings(as_json=True)
    seen["log"] = client.get_log_settings(as_json=True)
    seen["other_version_ready"] = client.is_model_ready("tiny", "7")
    seen["unknown_model_ready"] = client.is_model_ready("no")
    seen["statistics"] = client.get_inference_statistics("tiny", as_json=True)
    client.close()
    return seen


if __name__ == "__main__":
    json.dump(probe(sys.argv[1]), sys.stdout)
