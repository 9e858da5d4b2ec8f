"""The Open Inference Protocol: an existing client, unmodified, and requests that it cannot send."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc
from tests.support.servers import RunningServer, picture, pixels

Stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub


def test_tritonclient_works_unmodified(server: RunningServer) -> None:
    probe = Path(__file__).with_name("tritonclient_probe.py")
    done = subprocess.run(
        [sys.executable, str(probe), server.address], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["live"]
    assert seen["ready"]
    assert seen["model_ready"]
    assert seen["server"]["name"] == "ladderstitch"
    assert seen["metadata"]["inputs"] == [
        {"name": "images", "datatype": "UINT8", "shape": ["-1", "1", "8", "8"]}
    ]
    assert seen["config"]["config"]["max_batch_size"] == 32
    assert seen["config"]["config"]["input"][0]["dims"] == ["1", "8", "8"]
    assert seen["index"]["models"] == [{"name": "tiny", "version": "1", "state": "READY"}]
    assert seen["id"] == "abc"
    assert seen["agree"]
    assert np.array(seen["logits"]).shape == (2, 4)
    assert seen["sums"] == pytest.approx([1, 1], abs=1e-5)
    assert set(seen["labels"]) <= {"ankle", "bag", "coat", "dress"}
    parameters = seen["parameters"]
    assert parameters["ladderstitch_budget_source"] == "latency_budget_us"
    assert parameters["ladderstitch_budget_us"] == 5_000_000
    assert parameters["ladderstitch_budget_met"] is True
    assert parameters["ladderstitch_batch_size"] == 2
    assert seen["hard"][0] == "StatusCode.FAILED_PRECONDITION"
    assert "BUDGET_INFEASIBLE" in seen["hard"][1]
    assert seen["client_timeout"][0] in (
        "StatusCode.DEADLINE_EXCEEDED",
        "StatusCode.FAILED_PRECONDITION",
    )
    assert seen["bad_parameter"][0] == "StatusCode.INVALID_ARGUMENT"
    assert "did you mean 'min_quality'?" in seen["bad_parameter"][1]
    assert seen["own_parameter"] == ["OK", ""]
    for row, classes in zip(seen["logits"], seen["classes"], strict=True):
        values = [float(value.split(":")[0]) for value in classes]
        assert values == pytest.approx(sorted(row, reverse=True)[:3], abs=1e-4)
        best = ("ankle", "bag", "coat", "dress")[int(np.argmax(row))]
        assert classes[0].endswith(f":{int(np.argmax(row))}:{best}")
    assert seen["shared_memory"][0] == "StatusCode.INVALID_ARGUMENT"
    assert "shared_memory_byte_size" in seen["shared_memory"][1]
    assert seen["regions"] == {}
    assert seen["trace"]["settings"]["trace_level"] == {"value": ["OFF"]}
    assert seen["log"]["settings"]["log_error"] == {"bool_param": True}
    assert seen["other_version_ready"] is False
    assert seen["unknown_model_ready"] is False
    (statistics,) = seen["statistics"]["model_stats"]
    assert int(statistics["inference_count"]) >= 6
    assert int(statistics["inference_stats"]["success"]["count"]) >= 3
    assert sum(int(s["compute_infer"]["count"]) for s in statistics["batch_stats"]) == int(
        statistics["execution_count"]
    )


def infer_request(datatype: str = "UINT8", raw: bytes | None = None) -> pb.ModelInferRequest:
    """Return a request for variant 4 with one raw input."""
    request = pb.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="images", datatype=datatype, shape=[1, 1, 8, 8])
    request.raw_input_contents.append(pixels().tobytes() if raw is None else raw)
    request.parameters["variant_id"].int64_param = 4
    return request


def logits(response: pb.ModelInferResponse) -> np.ndarray:
    """Return the values of the first output."""
    return np.frombuffer(response.raw_output_contents[0], "<f4")


def test_infer_typed_and_raw_contents_agree(oip: Stub) -> None:
    expected = logits(oip.ModelInfer(infer_request()))
    typed = infer_request()
    del typed.raw_input_contents[:]
    typed.inputs[0].contents.uint_contents.extend(pixels().ravel().tolist())
    np.testing.assert_array_equal(logits(oip.ModelInfer(typed)), expected)
    floats = infer_request("FP32")
    del floats.raw_input_contents[:]
    normal = ((pixels() / 255 - 0.5) / 0.25).astype(np.float32)
    floats.inputs[0].contents.fp32_contents.extend(normal.ravel().tolist())
    np.testing.assert_allclose(logits(oip.ModelInfer(floats)), expected, atol=1e-5)


def test_infer_files_as_raw_and_typed_bytes_agree(oip: Stub) -> None:
    files = [picture((8, 8)), picture((20, 10), "JPEG")]
    raw = infer_request("BYTES", b"".join(len(file).to_bytes(4, "little") + file for file in files))
    raw.inputs[0].shape[:] = [2]
    typed = infer_request("BYTES")
    del typed.raw_input_contents[:]
    typed.inputs[0].shape[:] = [2, 1]
    typed.inputs[0].contents.bytes_contents.extend(files)
    np.testing.assert_array_equal(logits(oip.ModelInfer(raw)), logits(oip.ModelInfer(typed)))


def test_infer_accepts_triton_parameters_and_text_numbers(oip: Stub) -> None:
    request = infer_request()
    del request.parameters["variant_id"]
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    request.parameters["min_quality"].string_param = "0.655"
    answer = oip.ModelInfer(request)
    assert answer.parameters["ladderstitch_quality"].double_param == 0.66


def test_unknown_model_is_not_found_by_every_call(oip: Stub) -> None:
    for call in (
        lambda: oip.ModelMetadata(pb.ModelMetadataRequest(name="no")),
        lambda: oip.ModelConfig(pb.ModelConfigRequest(name="tiny", version="7")),
        lambda: oip.ModelStatistics(pb.ModelStatisticsRequest(name="no")),
        lambda: oip.ModelInfer(pb.ModelInferRequest(model_name="no")),
    ):
        with pytest.raises(grpc.RpcError) as missing:
            call()
        assert missing.value.code() == grpc.StatusCode.NOT_FOUND
        assert "MODEL_NOT_FOUND" in (missing.value.details() or "")
