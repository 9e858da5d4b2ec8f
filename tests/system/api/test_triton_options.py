"""Options of Triton's clients: each is honoured, harmless or refused, as docs/triton.md says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from ladderstitch.api.oip.options import (
    KIND_NAMES,
    OPTIONS,
    Option,
    Treatment,
    resembled_option,
)
from ladderstitch.client import Client
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc
from ladderstitch.v1 import generation_pb2, generation_pb2_grpc
from tests.conftest import make_tiny_bundle
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, pixels, start_server, stop_server

DOCS = Path(__file__).parents[3] / "docs" / "triton.md"
VALUES: dict[str, dict[str, Any]] = {
    "hard_deadline": {"bool_param": True},
    "latency_budget_us": {"int64_param": 3_000_000_000},
    "timeout": {"int64_param": 3_000_000_000},
    "variant_id": {"int64_param": 0},
    "min_confidence": {"double_param": 0.0},
    "min_quality": {"double_param": 0.0},
    "priority": {"uint64_param": 3},
    "temperature": {"double_param": 0.5},
    "top_p": {"double_param": 0.5},
    "sequence_id": {"string_param": "abc"},
}
"""Valid values of options; the others are valid with an integer."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Return a server of an image model `tiny`, and of a language model `text` that is loaded."""
    home = tmp_path_factory.mktemp("home")
    make_tiny_bundle(home / "tiny")
    for name in ("text", "later"):
        manifest = write_tiny(home / name) / "model.yaml"
        manifest.write_text(yaml.safe_dump(yaml.safe_load(manifest.read_text()) | {"name": name}))
    environment = {"LADDERSTITCH_HOME": str(home)}
    running = start_server(home / "tiny", home / "log", environment=environment)
    with Client(running.address) as client:
        client.load_model("text")
    yield running
    assert stop_server(running) == 0


@pytest.fixture
def stub(both: RunningServer) -> Iterator[Any]:
    with grpc.insecure_channel(both.address) as channel:
        yield grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)


def image_request() -> pb.ModelInferRequest:
    """Return a request to classify two images."""
    request = pb.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="images", datatype="UINT8", shape=[2, 1, 8, 8])
    request.raw_input_contents.append(pixels(2).tobytes())
    return request


def text_request() -> pb.ModelInferRequest:
    """Return a request for three tokens."""
    request = pb.ModelInferRequest(model_name="text")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append((1).to_bytes(4, "little") + b"a")
    request.parameters["max_tokens"].int64_param = 3
    return request


def send(stub: Any, request: pb.ModelInferRequest) -> str:
    """Return the error of a request that is sent on a stream; empty if it is answered."""
    answers = list(stub.ModelStreamInfer(iter([request]), timeout=300))
    errors: list[str] = [answer.error_message for answer in answers if answer.error_message]
    return "".join(errors)


def with_option(option: Option, request: pb.ModelInferRequest, name: str) -> pb.ModelInferRequest:
    """Return the request with the option in its place."""
    if option.place == "request":
        parameters = request.parameters
        if name == "hard_deadline":
            parameters["latency_budget_us"].int64_param = 3_000_000_000
    elif option.place == "input":
        parameters = request.inputs[0].parameters
    else:
        output = "logits" if request.model_name == "tiny" else "token_id"
        parameters = request.outputs.add(name=output).parameters
    parameters[name].MergeFrom(pb.InferParameter(**VALUES.get(name, {"int64_param": 3})))
    return request


def documented_rows() -> list[str]:
    """Return the rows of the table in the documentation."""
    lines = DOCS.read_text().splitlines()
    places = ("| request |", "| input |", "| output |", "| load |", "| unload |")
    return [line for line in lines if line.startswith(places)]


def test_documented_table_is_the_table_of_the_server() -> None:
    rows = []
    for key, group in groupby(OPTIONS, lambda o: (o.place, o.kind, o.treatment, o.note)):
        place, kind, treatment, note = key
        names = ", ".join(f"`{option.name}`" for option in group)
        models = KIND_NAMES[kind] if kind else "all"
        rows.append(f"| {place} | {names} | {models} | {treatment} | {note} |")
    assert documented_rows() == rows


@pytest.mark.parametrize(
    "option",
    [option for option in OPTIONS if option.place in ("request", "input", "output")],
    ids=lambda option: f"{option.place}-{option.name}",
)
def test_option_is_treated_as_the_table_says(stub: Any, option: Option) -> None:
    name = option.name.replace("*", "x")
    for kind, request in (("images", image_request()), ("text", text_request())):
        error = send(stub, with_option(option, request, name))
        if option.treatment == Treatment.REFUSED:
            refused = option.kind in (None, kind)
        elif option.treatment == Treatment.HONOURED:
            refused = option.kind not in (None, kind)
        else:
            refused = False
        assert error.startswith("INVALID_ARGUMENT: ") is refused, error
        assert (name in error) is refused, error


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("latency-budget-us", "latency_budget_us"),
        ("latency_budget_ms", "latency_budget_us"),
        ("budget_us", "latency_budget_us"),
        ("variant", "variant_id"),
        ("min_qualty", "min_quality"),
        ("Seed", "seed"),
        ("temperture", "temperature"),
    ],
)
def test_misspelt_parameter_is_refused_with_the_name_meant(
    stub: Any, name: str, meant: str
) -> None:
    for request in (image_request(), text_request()):
        request.parameters[name].int64_param = 1
        error = send(stub, request)
        assert error.startswith("INVALID_ARGUMENT: parameters: ")
        assert f"got {name!r}; did you mean {meant!r}?" in error


@pytest.mark.parametrize(
    "name", ["customer", "content_type", "trace_id", "user_id", "session", "x", "é", "k" * 5000]
)
def test_parameter_of_the_caller_passes_unread(stub: Any, name: str) -> None:
    known = [option.name for option in OPTIONS]
    assert resembled_option(name, known) is None
    for request in (image_request(), text_request()):
        for value in ({"string_param": "a"}, {"bool_param": True}, {"double_param": 1.5}, {}):
            request.parameters[name].CopyFrom(pb.InferParameter(**value))
            assert send(stub, request) == ""


@pytest.mark.parametrize("place", ["input", "output"])
def test_unknown_parameter_of_a_tensor_is_refused_by_name(stub: Any, place: str) -> None:
    for request in (image_request(), text_request()):
        option = Option(place, "codec", Treatment.REFUSED, "")  # type: ignore[arg-type] # a place
        error = send(stub, with_option(option, request, "codec"))
        assert error.startswith(f"INVALID_ARGUMENT: {place}s.parameters.codec: ")


def elements(raw: bytes) -> list[str]:
    """Return the elements of a BYTES tensor."""
    found = []
    while raw:
        length = int.from_bytes(raw[:4], "little")
        found.append(raw[4 : 4 + length].decode())
        raw = raw[4 + length :]
    return found


@pytest.mark.parametrize("output", ["logits", "probabilities"])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_class_count_returns_the_best_classes(stub: Any, output: str, count: int) -> None:
    request = image_request()
    request.parameters["variant_id"].int64_param = 4
    request.outputs.add(name=output)
    (values,) = stub.ModelInfer(request).raw_output_contents
    rows = np.frombuffer(values, "<f4").reshape(2, 4)
    request.outputs[0].parameters["classification"].int64_param = count
    response = stub.ModelInfer(request)
    assert response.outputs[0].datatype == "BYTES"
    assert list(response.outputs[0].shape) == [2, min(count, 4)]
    labels = ["ankle", "bag", "coat", "dress"]
    expected = [
        f"{row[i]:f}:{i}:{labels[i]}" for row in rows for i in np.argsort(-row)[: min(count, 4)]
    ]
    assert elements(response.raw_output_contents[0]) == expected


def test_class_count_that_is_no_number_is_refused(stub: Any) -> None:
    for value in ({"string_param": "3"}, {"int64_param": -1}, {}):
        request = image_request()
        output = request.outputs.add(name="logits")
        output.parameters["classification"].CopyFrom(pb.InferParameter(**value))
        assert "outputs.parameters.classification: expected" in send(stub, request)
    request = image_request()
    request.outputs.add(name="labels").parameters["classification"].int64_param = 2
    assert "classification" in send(stub, request)


def test_requested_outputs_of_text_are_returned_alone(stub: Any) -> None:
    for names in (["token_id"], ["text_output"], ["token_id", "text_output"]):
        request = text_request()
        for name in names:
            request.outputs.add(name=name)
        answers = list(stub.ModelStreamInfer(iter([request]), timeout=300))
        for answer in answers:
            assert [output.name for output in answer.infer_response.outputs] == names
    request = text_request()
    request.outputs.add(name="logits")
    assert "outputs: expected" in send(stub, request)
    request = text_request()
    for _ in range(2):
        request.outputs.add(name="token_id")
    assert "outputs: expected each once" in send(stub, request)


def counts(statistics: pb.ModelStatistics) -> set[int]:
    """Return the distinct counts of the durations of successful requests."""
    stats = statistics.inference_stats
    durations = (
        stats.success,
        stats.queue,
        stats.compute_input,
        stats.compute_infer,
        stats.compute_output,
    )
    return {duration.count for duration in durations}


def test_statistics_of_both_kinds_count_requests(stub: Any) -> None:
    before = {s.name: s for s in stub.ModelStatistics(pb.ModelStatisticsRequest()).model_stats}
    assert before.keys() == {"tiny", "text"}
    for request in (image_request(), text_request()):
        for _ in range(3):
            assert send(stub, request) == ""
    for name, images in (("tiny", 2), ("text", 1)):
        (after,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name=name)).model_stats
        first = before[name]
        assert counts(after) == {first.inference_stats.success.count + 3}
        assert after.inference_count - first.inference_count == 3 * images
        assert after.execution_count - first.execution_count == 3
        batches = after.batch_stats
        assert sum(b.compute_infer.count for b in batches) == after.execution_count
        assert sum(b.batch_size * b.compute_infer.count for b in batches) == after.inference_count
        assert after.inference_stats.fail.count == first.inference_stats.fail.count
        stats = after.inference_stats
        parts = (stats.queue.ns, stats.compute_infer.ns, stats.compute_output.ns)
        assert sum(parts) == pytest.approx(stats.success.ns, rel=1e-6, abs=10)
        assert after.last_inference > 0


def test_statistics_count_failed_generations(stub: Any) -> None:
    (before,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="text")).model_stats
    request = text_request()
    request.parameters["max_tokens"].int64_param = 100
    request.parameters["variant_id"].int64_param = 0
    request.parameters["timeout"].int64_param = 1000
    error = send(stub, request)
    (after,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="text")).model_stats
    failed = after.inference_stats.fail.count - before.inference_stats.fail.count
    assert failed == error.startswith("EXPIRED_")
    assert error
    assert counts(after) == counts(before)


def test_model_that_is_not_loaded_is_not_ready(both: RunningServer, stub: Any) -> None:
    def ready(name: str, version: str = "") -> bool:
        return bool(stub.ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready)

    assert ready("tiny")
    assert ready("text")
    assert not ready("later"), "fetched, but not loaded"
    assert not ready("fashion-mnist"), "comes with the package"
    assert not ready("tiny", "7"), "another version of a loaded model"
    with Client(both.address) as client:
        client.unload_model("text")
        assert not ready("text")
        client.load_model("text")
        assert ready("text")
    for unknown in ("no", "../tiny", "", "a" * 500):
        assert not ready(unknown)


def test_trace_and_log_settings_are_reported_and_not_changed(stub: Any) -> None:
    traces = stub.TraceSetting(pb.TraceSettingRequest(model_name="tiny"))
    assert list(traces.settings["trace_level"].value) == ["OFF"]
    logs = stub.LogSettings(pb.LogSettingsRequest())
    assert logs.settings["log_error"].bool_param is True
    trace = pb.TraceSettingRequest()
    trace.settings["trace_level"].value.append("TIMESTAMPS")
    log = pb.LogSettingsRequest()
    log.settings["log_verbose_level"].uint32_param = 1
    for call in (lambda: stub.TraceSetting(trace), lambda: stub.LogSettings(log)):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "configured when the server starts" in (refused.value.details() or "")
    with pytest.raises(grpc.RpcError) as missing:
        stub.TraceSetting(pb.TraceSettingRequest(model_name="no"))
    assert missing.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("kind", ["System", "Cuda"])
def test_shared_memory_is_reported_empty_and_not_registered(stub: Any, kind: str) -> None:
    def call(method: str, **fields: str) -> Any:
        name = f"{kind}SharedMemory{method}"
        return getattr(stub, name)(getattr(pb, f"{name}Request")(**fields))

    assert not call("Status").regions
    call("Unregister")
    call("Unregister", name="region")
    with pytest.raises(grpc.RpcError) as refused:
        call("Register", name="region")
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "send tensors in the message" in (refused.value.details() or "")
    with pytest.raises(grpc.RpcError) as unknown:
        call("Status", name="region")
    assert unknown.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_repository_options_are_treated_as_the_table_says(stub: Any) -> None:
    for name in ("config", "file:1/model.onnx", "anything"):
        request = pb.RepositoryModelLoadRequest(model_name="text")
        request.parameters[name].string_param = "{}"
        with pytest.raises(grpc.RpcError) as refused:
            stub.RepositoryModelLoad(request)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert f"parameters.{name}: expected" in (refused.value.details() or "")
    for call, message in (
        (stub.RepositoryIndex, pb.RepositoryIndexRequest(repository_name="r")),
        (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(repository_name="r")),
        (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(repository_name="r")),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call(message)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    request = pb.RepositoryModelUnloadRequest(model_name="text")
    request.parameters["unload_dependents"].bool_param = True
    stub.RepositoryModelUnload(request)
    stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="text"))


def test_long_inputs_of_text_calls_are_refused_as_invalid(both: RunningServer) -> None:
    requests = [
        generation_pb2.GenerateRequest(text="a", stop=["é" * 3000] * 40),
        generation_pb2.GenerateRequest(text="a" * 500_000),
        generation_pb2.GenerateRequest(tokens={"ids": [2**31 - 1] * 50}),
        generation_pb2.GenerateRequest(text="a", request_id="猫" * 5000),
    ]
    metadata = [(key, "~%" * 4000) for key in ("x-latency-budget-ms", "x-llm-d-slo-ttft-ms")]
    metadata += [("x-ladderstitch-held-us", value) for value in ("9" * 5000, "x" * 5000)]
    good = generation_pb2.GenerateRequest(text="a", max_tokens=1)
    cases: list[tuple[Any, Any]] = [(request, ()) for request in requests]
    cases += [(good, (pair,)) for pair in metadata]
    with grpc.insecure_channel(both.address) as channel:
        native: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        for request, pairs in cases:
            request.model_name = "text"
            for _ in range(6):
                with pytest.raises(grpc.RpcError) as refused:
                    list(native.Generate(request, metadata=pairs, timeout=300))
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert "expected" in (refused.value.details() or "")


def test_bytes_of_too_many_elements_are_refused(stub: Any) -> None:
    empty = bytes(4 * 100_000)
    request = image_request()
    request.inputs[0].datatype = "BYTES"
    request.raw_input_contents[0] = empty
    assert "images: expected 1 to 32 elements, got more" in send(stub, request)
    request = text_request()
    request.raw_input_contents[0] = empty
    assert "text_input: expected 1 to 1 elements, got more" in send(stub, request)
    del request.raw_input_contents[:]
    request.inputs[0].contents.bytes_contents.extend([b""] * 5)
    assert "text_input: expected 1 to 1 elements, got 5" in send(stub, request)
