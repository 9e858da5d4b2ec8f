"""Text over gRPC from a real server on two ranks, compared with the model run in one process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ladderstitch.client import (
    AsyncClient,
    Client,
    RequestFailed,
    TextChunk,
    scheduling_settings,
)
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.v1 import generation_pb2, generation_pb2_grpc
from tests.support.language_models import greedy, write_tiny
from tests.support.servers import RunningServer, start_server, stop_server

PROMPT = "a prompt of bytes"
TEXT_INPUT = {"name": "text_input", "datatype": "BYTES", "shape": [1]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    paths = (
        TextVariant(name="standard", residual=ResidualScheme()),
        TextVariant(name="ladder", residual=ResidualScheme(scheme="ladder")),
    )
    return TextBundle.load(write_tiny(tmp_path_factory.mktemp("models") / "tiny", paths=paths))


@pytest.fixture(scope="module")
def server(bundle: TextBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    running = start_server(bundle.path, log, "--tensor-parallel-size", "2", "--spare-ranks", "1")
    yield running
    assert stop_server(running) == 0


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as opened:
        yield opened


def rank_pids(server: RunningServer) -> list[int]:
    """Return the ids of the child processes that run ranks, oldest first."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return [
        int(pid)
        for pid in children.split()
        if b"ladderstitch.text.engine.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_generate_streams_the_greedy_answer_without_gaps(
    client: Client, bundle: TextBundle
) -> None:
    chunks = list(client.generate(PROMPT, max_tokens=20))
    assert [chunk.token for chunk in chunks] == greedy(bundle, PROMPT, 20)
    assert [chunk.index for chunk in chunks] == list(range(20))
    assert "".join(p.text for p in chunks) == bundle.tokenizer().decode([p.token for p in chunks])
    assert [chunk.finish for chunk in chunks[:-1]] == [None] * 19
    last = chunks[-1]
    assert last.finish == "length"
    assert last.accounting is not None
    assert last.accounting.prompt_tokens == len(PROMPT)
    assert last.accounting.generated_tokens == 20
    assert 0 < last.accounting.first_token_us <= last.accounting.total_us


def test_generate_prompt_as_tokens_equals_prompt_as_text(
    client: Client, bundle: TextBundle
) -> None:
    tokens = bundle.tokenizer().encode(PROMPT)
    by_tokens = [chunk.token for chunk in client.generate(tokens, max_tokens=5)]
    assert by_tokens == [chunk.token for chunk in client.generate(PROMPT, max_tokens=5)]


def test_generate_stop_text_ends_the_answer_before_it(client: Client) -> None:
    def text(chunks: list[TextChunk]) -> str:
        return "".join(chunk.text for chunk in chunks)

    whole = text(list(client.generate(PROMPT, max_tokens=24)))
    stop = whole[6:9]
    chunks = list(client.generate(PROMPT, max_tokens=24, stop=[stop, "never comes"]))
    assert text(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish == "stop"


def test_generate_equal_seeds_sample_equal_tokens(client: Client) -> None:
    def sample(seed: int) -> list[int]:
        options: Any = {"temperature": 1.5, "top_k": 50, "top_p": 0.95}
        return [p.token for p in client.generate(PROMPT, max_tokens=12, seed=seed, **options)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"min_quality": 1.5}, "min_quality"),
        ({"token_budget_s": 0.0}, "token_budget_us"),
        ({"first_token_budget_s": -1.0}, "first_token_budget_us"),
        ({"logprobs": 21}, "logprobs"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"budget_s": 1e-9}, "latency_budget_us"),
        ({"hard": True}, "hard_deadline"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [5, 257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x" * 200}, "prompt"),
        ({"prompt": "x" * 10_000}, "text"),
    ],
)
def test_generate_invalid_field_is_named(
    client: Client, options: dict[str, object], field: str
) -> None:
    prompt = options.pop("prompt", PROMPT)
    with pytest.raises(RequestFailed) as failure:
        list(client.generate(prompt, **options))  # type: ignore[arg-type] # as the cases name them
    assert failure.value.reason == "INVALID_ARGUMENT"
    assert list(failure.value.violations) == [field]


def test_generate_accounting_has_variant_and_met_budgets(client: Client) -> None:
    chunks = list(
        client.generate(
            PROMPT,
            max_tokens=6,
            budget_s=60,
            first_token_budget_s=1e-6,
            token_budget_s=30,
            min_quality=0.6,
        )
    )
    cost = chunks[-1].accounting
    assert cost is not None
    assert (cost.variant_name, cost.variant_id, cost.perplexity) == ("standard", 0, 10.0)
    assert [(s.variant_id, s.variant_name, s.tokens) for s in cost.spans] == [(0, "standard", 6)]
    assert cost.quality == pytest.approx(0.6)
    assert cost.quality_metric == "next-token accuracy on nothing"
    assert (cost.budget_met, cost.first_token_budget_met, cost.token_budget_met) == (1, 0, 1)
    assert cost.first_token_us + 5 * cost.mean_token_us == pytest.approx(cost.total_us, abs=10)
    pinned = list(client.generate(PROMPT, max_tokens=2, variant=1))[-1].accounting
    assert pinned is not None
    assert (pinned.variant_name, pinned.perplexity) == ("ladder", 11.0)
    assert not pinned.HasField("token_budget_us")


def test_generate_reads_budgets_from_metadata(server: RunningServer) -> None:
    keys = [("x-llm-d-slo-ttft-ms", "0.001"), ("x-llm-d-slo-tpot-ms", "9000")]
    request = generation_pb2.GenerateRequest(text=PROMPT, max_tokens=3, token_budget_us=10**8)
    with grpc.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        cost = list(stub.Generate(request, timeout=300, metadata=keys))[-1].accounting
        assert (cost.first_token_budget_us, cost.token_budget_us) == (1, 9_000_000)
        assert (cost.first_token_budget_met, cost.token_budget_met) == (False, True)
        wrong = [("x-llm-d-slo-tpot-ms", "soon")]
        with pytest.raises(grpc.RpcError) as failure:
            list(stub.Generate(request, timeout=300, metadata=wrong))
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "x-llm-d-slo-tpot-ms: expected" in failure.value.details()


@pytest.mark.parametrize(
    ("options", "reason", "metadata"),
    [
        ({"variant": 2}, "VARIANT_NOT_FOUND", {}),
        ({"min_quality": 0.7}, "QUALITY_UNAVAILABLE", {"max_quality": "0.600000"}),
        ({"budget_s": 1e-5, "hard": True}, "BUDGET_INFEASIBLE", {}),
    ],
)
def test_generate_infeasible_request_is_rejected(
    client: Client, options: dict[str, object], reason: str, metadata: dict[str, str]
) -> None:
    with pytest.raises(RequestFailed) as failure:
        list(client.generate(PROMPT, **options))  # type: ignore[arg-type] # as the cases name them
    assert failure.value.reason == reason
    assert metadata.items() <= failure.value.metadata.items()


def test_generate_reports_log_probabilities(client: Client) -> None:
    for chunk in client.generate(PROMPT, max_tokens=4, logprobs=2):
        assert len(chunk.alternatives) == 2
        assert chunk.alternatives[0] == (chunk.token, chunk.logprob)  # greedy sampling


def test_get_scheduling_of_a_text_server_names_its_settings(client: Client) -> None:
    settings = scheduling_settings(client.get_scheduling())
    assert settings["policy"] == "adaptive"
    assert settings["pinned_variant"] is None
    assert settings["min_quality"] == 0.0


def test_update_scheduling_pins_a_text_variant(client: Client) -> None:
    def answering_variant() -> str:
        cost = list(client.generate(PROMPT, max_tokens=1))[-1].accounting
        assert cost is not None
        return cost.variant_name

    client.update_scheduling(pinned_variant=1)
    try:
        assert answering_variant() == "ladder"
        with pytest.raises(RequestFailed, match="expected a variant of 'tiny', got 2"):
            client.update_scheduling(pinned_variant=2)
    finally:
        client.update_scheduling(unpin=True)
    assert answering_variant() == "standard"
    variants = client.get_model().language.variants
    names = [(variant.name, variant.residual) for variant in variants]
    assert names == [("standard", "standard"), ("ladder", "ladder")]
    assert variants[1].planned_token_us > 0


async def test_generate_32_concurrent_streams_are_correct(
    server: RunningServer, bundle: TextBundle
) -> None:
    prompts = [PROMPT[: 1 + n % len(PROMPT)] for n in range(32)]
    expected = {prompt: greedy(bundle, prompt, 6) for prompt in set(prompts)}
    async with AsyncClient(server.address) as client:

        async def stream(prompt: str) -> list[int]:
            answer = client.generate(prompt, max_tokens=6, timeout_s=300)
            return [chunk.token async for chunk in answer]

        answers = await asyncio.gather(*(stream(prompt) for prompt in prompts))
    assert answers == [expected[prompt] for prompt in prompts]


def test_generate_without_a_prompt_is_rejected(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        list(client.generation.Generate(generation_pb2.GenerateRequest(), timeout=300))
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_predict_text_model_error_names_generate(client: Client) -> None:
    with pytest.raises(RequestFailed, match="'tiny' generates text: call Generate"):
        client.predict(b"no picture")
    (summary,) = client.list_models().models
    assert summary.generates_text
    assert summary.variants == 2
    described = client.get_model("tiny").language
    assert (described.layers, described.tensor_parallel_size, described.residual) == (
        3,
        2,
        "standard",
    )


def test_generate_hard_deadline_ends_the_stream(client: Client) -> None:
    """A slow machine may reject the request instead."""
    with pytest.raises(RequestFailed) as failure:
        list(client.generate(PROMPT, max_tokens=100, variant=0, budget_s=0.02, hard=True))
    assert failure.value.reason in (
        "EXPIRED_IN_QUEUE",
        "EXPIRED_IN_COMPUTE",
        "BUDGET_INFEASIBLE",
        "OVERLOADED",
    )
    soft = list(client.generate(PROMPT, max_tokens=40, variant=0, budget_s=0.001))
    accounting = soft[-1].accounting
    assert accounting is not None
    assert len(soft) == 40
    assert not accounting.budget_met


def test_metrics_count_tokens_and_results(client: Client, server: RunningServer) -> None:
    def value(name: str) -> float:
        with urllib.request.urlopen(server.metrics) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    answered = 'ladderstitch_requests_total{code="OK",model="tiny",variant="0"}'
    rejected = 'ladderstitch_requests_total{code="INVALID_ARGUMENT",model="tiny",variant="none"}'
    names = ("ladderstitch_generated_tokens_total", answered, rejected)
    before = [value(name) for name in names]
    list(client.generate(PROMPT, max_tokens=7))
    with pytest.raises(RequestFailed):
        list(client.generate("", max_tokens=7))
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [7, 1, 1]
    assert value("ladderstitch_inter_token_latency_seconds_count") >= 6
    assert value("ladderstitch_model_ready") == 1


async def test_generate_cancelled_stream_frees_its_place(server: RunningServer) -> None:
    async with AsyncClient(server.address) as client:
        cancelled = client.generate(PROMPT, max_tokens=100)
        assert (await anext(cancelled)).index == 0
        await cancelled.aclose()  # type: ignore[attr-defined] # it is a generator
        chunks = [chunk async for chunk in client.generate(PROMPT, max_tokens=3, timeout_s=300)]
    assert len(chunks) == 3


async def test_generate_streams_survive_a_killed_rank(
    server: RunningServer, bundle: TextBundle
) -> None:
    expected = greedy(bundle, PROMPT, 40)

    async def stream(client: AsyncClient, started: asyncio.Event) -> list[TextChunk]:
        chunks = []
        async for chunk in client.generate(PROMPT, max_tokens=40, timeout_s=300):
            chunks.append(chunk)
            if chunk.index == 3:
                started.set()
        return chunks

    async with AsyncClient(server.address) as client:
        for victim in (0, 1):  # the spare replaces the first one
            started = asyncio.Event()
            streams = [asyncio.create_task(stream(client, started)) for _ in range(3)]
            await started.wait()
            os.kill(rank_pids(server)[victim], signal.SIGKILL)
            for chunks in await asyncio.gather(*streams):
                assert [chunk.token for chunk in chunks] == expected
                assert [chunk.index for chunk in chunks] == list(range(40))


def test_serve_ctrl_c_completes_open_streams(bundle: TextBundle, tmp_path: Path) -> None:
    server = start_server(bundle.path, tmp_path / "log")
    with Client(server.address) as client:
        stream = client.generate(PROMPT, max_tokens=80)
        first = next(stream)
        server.process.send_signal(signal.SIGINT)
        chunks = [first, *stream]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert chunks[-1].finish is not None
    assert server.process.wait(300) == 0
    assert server.process.stdout is not None
    server.process.stdout.close()
    assert not re.search("Traceback", server.log.read_text())


def test_serve_rejects_a_number_of_ranks_that_does_not_fit(bundle: TextBundle) -> None:
    command = [sys.executable, "-m", "ladderstitch", "serve", "--model", str(bundle.path)]
    done = subprocess.run(
        [*command, "--tensor-parallel-size", "5", "--no-ray"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "ranks: expected at most 3 (the KV heads) or a divisor of 6" in " ".join(
        done.stderr.split()
    )


def test_tritonclient_streams_tokens_unmodified(server: RunningServer, bundle: TextBundle) -> None:
    probe = Path(__file__).with_name("tritonclient_text_probe.py")
    done = subprocess.run(
        [sys.executable, str(probe), server.address],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["tokens"]["first"] == greedy(bundle, PROMPT, 6)
    assert seen["finals"]["first"]["ladderstitch_variant_name"] == "standard"
    assert json.loads(seen["finals"]["first"]["ladderstitch_spans"]) == [["standard", 6]]
    assert seen["finals"]["first"]["ladderstitch_finish_reason"] == "length"
    assert 1 <= len(seen["tokens"]["second"]) <= 3
    assert seen["finals"]["second"]["ladderstitch_budget_met"] is True
    (error,) = seen["errors"]
    assert error.startswith("INVALID_ARGUMENT: prompt: expected at least one token")
    assert seen["metadata"]["inputs"] == [
        {"name": "text_input", "datatype": "BYTES", "shape": ["1"]}
    ]
    assert seen["config"]["config"]["model_transaction_policy"] == {"decoupled": True}


@pytest.mark.parametrize(
    ("tensor", "parameters", "field"),
    [
        ({"name": "images", "datatype": "BYTES", "shape": [1]}, {}, "inputs"),
        ({"name": "text_input", "datatype": "FP32", "shape": [1]}, {}, "text_input"),
        ({"name": "text_input", "datatype": "BYTES", "shape": [2]}, {}, "text_input"),
        ({"name": "text_input", "datatype": "BYTES", "shape": [1]}, {"max_token": 1}, "parameters"),
        (
            {"name": "text_input", "datatype": "BYTES", "shape": [1]},
            {"max_tokens": 0},
            "max_tokens",
        ),
        (
            {"name": "text_input", "datatype": "BYTES", "shape": [1]},
            {"variant_id": 7},
            "variant_id",
        ),
    ],
)
def test_oip_stream_continues_after_a_failed_request(
    server: RunningServer, tensor: dict[str, object], parameters: dict[str, int], field: str
) -> None:
    def request(tensor: dict[str, object], text: bytes, **given: int) -> pb.ModelInferRequest:
        message = pb.ModelInferRequest(
            model_name="tiny",
            inputs=[pb.ModelInferRequest.InferInputTensor(**tensor)],  # type: ignore[arg-type] # as in the cases
            raw_input_contents=[len(text).to_bytes(4, "little") + text],
        )
        for name, value in given.items():
            message.parameters[name].int64_param = value
        return message

    with grpc.insecure_channel(server.address) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        sent = [
            request(tensor, b"x", **parameters),
            request(TEXT_INPUT, b"\xff\xfe"),
            request(TEXT_INPUT, b"a prompt", max_tokens=2, variant_id=0),
        ]
        answers = list(stub.ModelStreamInfer(iter(sent), timeout=300))
    errors = [answer.error_message for answer in answers if answer.error_message]
    assert len(errors) == 2
    assert any(f"{field}: " in error for error in errors)
    assert any("expected UTF-8" in error for error in errors)
    finals = [a.infer_response.parameters["triton_final_response"].bool_param for a in answers]
    assert sum(finals) == 3


def test_oip_stream_reads_token_budgets_from_metadata(server: RunningServer) -> None:
    request = pb.ModelInferRequest(
        model_name="tiny",
        inputs=[pb.ModelInferRequest.InferInputTensor(**TEXT_INPUT)],  # type: ignore[arg-type] # one dict for all
        raw_input_contents=[(1).to_bytes(4, "little") + b"x"],
    )
    request.parameters["max_tokens"].int64_param = 3

    with grpc.insecure_channel(server.address) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def last(key: str, value: str) -> pb.ModelStreamInferResponse:
            metadata = ((key, value),)
            answers: list[pb.ModelStreamInferResponse] = list(
                stub.ModelStreamInfer(iter([request]), metadata=metadata, timeout=300)
            )
            return answers[-1]

        for key in ("x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"):
            for value, met in (("60000", True), ("0.001", False)):
                returned = last(key, value).infer_response.parameters
                assert "ladderstitch_budget_met" in returned
                assert returned["ladderstitch_budget_met"].bool_param is met
            assert f"{key}: expected" in last(key, "soon").error_message
