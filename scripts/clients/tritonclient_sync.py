# /// script
# dependencies = ["tritonclient[grpc]==2.73.0"]
#
# [tool.ladderstitch]
# package = "tritonclient"
# quick = true
# ///
"""NVIDIA's client, blocking calls: images in three formats, class counts, state, statistics."""

from __future__ import annotations

import os
import queue

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

IMAGES, TEXT = os.environ["LADDERSTITCH_IMAGE_MODEL"], os.environ["LADDERSTITCH_TEXT_MODEL"]


def check_state(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(IMAGES)
    assert client.is_model_ready(TEXT)
    assert not client.is_model_ready("no-such-model")
    index = client.get_model_repository_index(as_json=True)["models"]
    assert {IMAGES, TEXT} <= {model["name"] for model in index}
    assert "statistics" in client.get_server_metadata().extensions
    print("ok state")


def check_images(client: triton.InferenceServerClient) -> None:
    (described,) = client.get_model_metadata(IMAGES).inputs
    shape = [2, *described.shape[1:]]
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    tensor = triton.InferInput(described.name, shape, described.datatype)
    tensor.set_data_from_numpy(pixels)
    logits = client.infer(IMAGES, [tensor]).as_numpy("logits")
    assert logits.shape[0] == 2
    assert np.isfinite(logits).all()
    best = triton.InferRequestedOutput("probabilities", class_count=3)
    classes = client.infer(IMAGES, [tensor], outputs=[best]).as_numpy("probabilities")
    assert classes.shape == (2, 3)
    value, index, _ = classes[0, 0].decode().split(":")
    assert 0 < float(value) <= 1
    assert 0 <= int(index) < logits.shape[1]
    print("ok infer with class_count")


def check_odd_numbers(client: triton.InferenceServerClient) -> None:
    shape = [1, *client.get_model_metadata(IMAGES).inputs[0].shape[1:]]
    tensor = triton.InferInput("images", shape, "FP32")
    tensor.set_data_from_numpy(np.full(shape, np.nan, np.float32))
    assert client.infer(IMAGES, [tensor]).as_numpy("logits").shape[0] == 1
    print("ok NaN is computed")


def check_text(client: triton.InferenceServerClient) -> None:
    results: queue.Queue[object] = queue.Queue()
    client.start_stream(lambda result, error: results.put(error or result))
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"The capital of France is"], object))
    client.async_stream_infer(TEXT, [tensor], parameters={"max_tokens": 5})
    texts = []
    while True:
        result = results.get(timeout=120)
        assert isinstance(result, triton.InferResult), result
        texts.append(result.as_numpy("text_output")[0].decode())
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()
    assert 1 <= len(texts) <= 5
    print("ok stream of tokens")


def check_statistics(client: triton.InferenceServerClient) -> None:
    models = client.get_inference_statistics(as_json=True)["model_stats"]
    assert {IMAGES, TEXT} <= {model["name"] for model in models}
    for model in models:
        durations = model["inference_stats"]
        names = ("success", "queue", "compute_input", "compute_infer", "compute_output")
        counts = {durations[name].get("count", "0") for name in names}
        assert len(counts) == 1, durations
        batches = model.get("batch_stats", [])
        executed = sum(int(batch["compute_infer"]["count"]) for batch in batches)
        assert executed == int(model.get("execution_count", 0))
    print("ok statistics")


def check_refusals(client: triton.InferenceServerClient) -> None:
    def refusal(call: object, *arguments: object, **options: object) -> str:
        try:
            call(*arguments, **options)
        except InferenceServerException as error:
            return f"{error.status()} {error.message()}"
        raise AssertionError("expected a refusal, got an answer")

    shared = refusal(client.register_system_shared_memory, "region", "/key", 64)
    assert "UNIMPLEMENTED" in shared
    assert "shared memory is not supported" in shared
    traces = refusal(client.update_trace_settings, settings={"trace_level": ["TIMESTAMPS"]})
    assert "UNIMPLEMENTED" in traces
    assert client.get_trace_settings(as_json=True)["settings"]["trace_level"]["value"] == ["OFF"]
    assert client.get_log_settings(as_json=True)["settings"]["log_error"]["bool_param"]
    assert "NOT_FOUND" in refusal(client.get_model_metadata, "no-such-model")
    print("ok settings and refusals")


def main() -> None:
    with triton.InferenceServerClient(os.environ["LADDERSTITCH_GRPC"]) as client:
        check_state(client)
        check_images(client)
        check_odd_numbers(client)
        check_text(client)
        check_statistics(client)
        check_refusals(client)


if __name__ == "__main__":
    main()
