"""Tests of the verdicts of the fuzzer, against servers that are wrong on purpose."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.v1 import generation_pb2, inference_pb2
from ladderstitch_loadtest.faults.fuzzing import report
from ladderstitch_loadtest.faults.fuzzing.campaign import CampaignResult, run_campaign
from ladderstitch_loadtest.faults.fuzzing.cases import Answer, Case, draw_case
from ladderstitch_loadtest.faults.fuzzing.entrances import all_entrances
from ladderstitch_loadtest.faults.fuzzing.good_callers import GoodSample
from ladderstitch_loadtest.faults.fuzzing.http_sender import HttpSender, is_whole_request
from ladderstitch_loadtest.faults.fuzzing.observations import Footprint, quantile_between
from ladderstitch_loadtest.faults.fuzzing.rpc_sender import RpcSender
from ladderstitch_loadtest.faults.fuzzing.verdict import judge

ENTRANCES = {entrance.name: entrance for entrance in all_entrances()}
GENERATE, INFER, COMPLETIONS, SOCKET = (
    ENTRANCES[name] for name in ("Generate", "Infer", "completions", "socket")
)
REQUEST = generation_pb2.GenerateRequest(text="a", max_tokens=2)
ERROR = b'{"error": {"message": "model: no", "type": "invalid_request_error"}}'
CHOICE = {"index": 0, "text": "a", "finish_reason": "stop"}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def rpc_case(**fields: Any) -> Case:
    return Case(0, "fields", GENERATE, (REQUEST.SerializeToString(),), **fields)


def tokens(*indices: int, finish: int = 2, logprob: float = -1.0) -> list[bytes]:
    made = [generation_pb2.GenerateResponse(index=index, logprob=logprob) for index in indices]
    made[-1].finish_reason = finish  # type: ignore[assignment] # a number
    made[-1].accounting.generated_tokens = len(made)
    return [one.SerializeToString() for one in made]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer("OK", body=tokens(0, 1)), ""),
        (Answer("OK", body=tokens(0, 2)), "indices"),
        (Answer("OK", body=tokens(0, 1, 2)), "at most 2 tokens"),
        (Answer("OK", body=tokens(0, 1, finish=0)), "a finish in the last"),
        (Answer("OK", body=tokens(0, logprob=math.nan)), "finite log"),
        (Answer("OK"), "expected responses"),
        (Answer("INVALID_ARGUMENT", "INVALID_ARGUMENT", "text: no"), ""),
        (Answer("INVALID_ARGUMENT", "INVALID_ARGUMENT", ""), "without details"),
        (Answer("INTERNAL", "INTERNAL", "error"), "got INTERNAL"),
        (Answer("UNKNOWN", "", "error"), "got UNKNOWN"),
        (Answer("UNAVAILABLE", "DRAINING", "error"), "got UNAVAILABLE"),
        (Answer("RESOURCE_EXHAUSTED", "", "metadata size"), "got RESOURCE_EXHAUSTED"),
        (Answer("RESOURCE_EXHAUSTED", "OVERLOADED", "busy"), ""),
        (Answer("cancelled"), "cancelled by the server"),
        (Answer("hang"), "hang"),
    ],
)
def test_an_rpc_answer_gets_its_verdict(answer: Answer, fault: str) -> None:
    found = judge(rpc_case(), answer)
    assert fault in found
    assert bool(fault) == bool(found)


def test_a_message_that_cannot_be_parsed_must_be_refused() -> None:
    case = Case(0, "wire", GENERATE, (b"\x0a\xff",))
    assert "cannot be parsed" in judge(case, Answer("OK", body=tokens(0)))


def test_a_missed_deadline_is_right_only_if_the_case_has_one() -> None:
    late = Answer("DEADLINE_EXCEEDED", "", "Deadline Exceeded")
    assert judge(rpc_case(deadline_s=0.01), late) == ""
    assert "DEADLINE_EXCEEDED" in judge(rpc_case(), late)
    expired = Answer("DEADLINE_EXCEEDED", "EXPIRED_IN_QUEUE", "late")
    assert judge(rpc_case(), expired) == ""


@pytest.mark.parametrize(
    ("images", "logit", "right"), [(1, 0.5, True), (2, 0.5, False), (1, math.nan, False)]
)
def test_predictions_must_be_finite_and_one_per_image(
    images: int, logit: float, right: bool
) -> None:
    request = inference_pb2.InferRequest(encoded_image=b"x")
    response = inference_pb2.InferResponse()
    response.accounting.batch_size = 9
    for _ in range(images):
        response.predictions.add(logits=[logit])
    case = Case(0, "image", INFER, (request.SerializeToString(),))
    assert (judge(case, Answer("OK", body=[response.SerializeToString()])) == "") is right


@pytest.mark.parametrize(
    ("status", "body", "right"),
    [
        ("200", json.dumps({"choices": [CHOICE], "usage": USAGE}).encode(), True),
        ("200", json.dumps({"choices": [CHOICE] * 2, "usage": USAGE}).encode(), False),
        ("200", b'{"choices": [], "usage": {}}', False),
        ("200", b'{"choices": NaN}', False),
        ("400", ERROR, True),
        ("400", b"no", False),
        ("400", b'{"error": {"message": "", "type": "a"}}', False),
        ("500", ERROR, False),
        ("504", ERROR, False),
        ("307", b"", False),
        ("closed", b"", False),
        ("reset", b"", False),
    ],
)
def test_an_http_answer_gets_its_verdict(status: str, body: bytes, right: bool) -> None:
    case = Case(0, "structure", COMPLETIONS, (b"{}",))
    assert (judge(case, Answer(status, body=[body])) == "") is right


@pytest.mark.parametrize(
    ("events", "right"),
    [
        ([{"choices": [CHOICE]}, "[DONE]"], True),
        ([{"choices": [CHOICE]}], False),
        ([{"choices": [CHOICE]}, {"choices": [CHOICE]}, "[DONE]"], False),
        ([{"choices": []}, "[DONE]"], False),
        ([{"error": {"message": "late", "type": "timeout_error"}}], True),
        ([{"error": {"message": "late", "type": "server_error"}}], False),
        ([{"error": {"message": "late", "type": "timeout_error"}}, "[DONE]"], False),
    ],
)
def test_a_stream_of_events_has_one_finish_and_one_end(events: list[Any], right: bool) -> None:
    text = "".join(
        f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in events
    )
    answer = Answer("200", body=[text.encode()], headers={"content-type": "text/event-stream"})
    assert (judge(Case(0, "structure", COMPLETIONS, (b"{}",)), answer) == "") is right


def test_bytes_on_a_socket_may_be_refused_but_not_fail() -> None:
    case = Case(0, "bytes", SOCKET, (b"POST / HTTP/1.1\r\n",))
    assert judge(case, Answer("closed")) == judge(case, Answer("incomplete")) == ""
    assert judge(case, Answer("400", body=[b"Invalid HTTP request received."])) == ""
    assert judge(case, Answer("400", body=[b""])) != ""
    assert judge(case, Answer("500", body=[b"error"])) != ""
    assert judge(case, Answer("hang")) == "hang"


def test_whole_requests_are_told_from_parts() -> None:
    whole = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nab"
    assert is_whole_request(whole)
    assert is_whole_request(whole + whole)
    for part in (b"", whole[:-1], whole[:9], b"\0\1\2", b"HTTP"):
        assert not is_whole_request(part)


async def test_a_campaign_finds_a_server_that_answers_wrongly_or_never() -> None:
    """The server ends one stream with INTERNAL, never ends another, and refuses the others."""
    calls = 0

    async def generate(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        nonlocal calls
        calls += 1
        if calls == 3:
            await asyncio.Event().wait()
        if calls == 5:
            await context.abort(grpc.StatusCode.INTERNAL, "a fault")
        for token in tokens(0):
            yield token

    handlers = {"Generate": grpc.unary_stream_rpc_method_handler(generate)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("ladderstitch.v1.GenerationService", handlers)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sender = RpcSender(f"127.0.0.1:{port}", hang_s=1.0)
    indices = [i for i in range(400) if draw_case([GENERATE], 1, i).kind in ("metadata", "image")][
        :20
    ]
    found = await run_campaign(sender, [GENERATE], 1, indices)
    await sender.close()
    await server.stop(None)
    assert found.requests == 20
    faults = {name.partition(": ")[2][:12] for name in found.faults}
    assert {"hang", "got INTERNAL"} <= faults
    assert all(wrong.index in indices and wrong.seed == 1 for wrong in found.wrong)


async def test_an_http_connection_is_used_again_and_a_closed_one_replaced() -> None:
    connections = 0

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(size)
            size_line = f"HTTP/1.1 400 Bad Request\r\ncontent-length: {len(ERROR)}\r\n\r\n"
            writer.write(size_line.encode() + ERROR)
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    sender = HttpSender(f"127.0.0.1:{port}", hang_s=60)
    for _ in range(5):
        answer = await sender.send(Case(0, "text", COMPLETIONS, (b"{}",)))
        assert (answer.status, answer.body) == ("400", [ERROR])
    assert connections == 3
    await sender.close()
    server.close()
    await server.wait_closed()


def make_report(**fields: Any) -> report.FuzzReport:
    quiet = report.GoodLatency(10, 0, 1.0, 2.0, 3.0)
    footprint = Footprint(400.0, 20, 2)
    defaults = {
        "seed": 1,
        "seconds": 1.0,
        "campaign": CampaignResult(),
        "quiet": quiet,
        "busy": quiet,
        "late": 0,
        "good_faults": (),
        "before": footprint,
        "after": footprint,
        "lag_p99_s": math.nan,
    }
    return report.FuzzReport(**defaults | fields)


def test_a_report_names_each_limit_that_is_exceeded() -> None:
    assert make_report().failures(timing=True) == []
    assert make_report(after=Footprint(500.0, 20, 2)).failures(timing=False) == [
        "memory: expected at most 436.0 MiB, got 500.0"
    ]
    assert make_report(after=Footprint(400.0, 21, 2)).failures(timing=False) == [
        "descriptors: expected at most 20, got 21"
    ]
    slow = make_report(late=1, lag_p99_s=0.1)
    assert slow.failures(timing=False) == []
    assert len(slow.failures(timing=True)) == 2
    wrong = make_report(busy=report.GoodLatency(10, 1, 1.0, 2.0, 3.0))
    assert "1 good requests" in wrong.failures(timing=False)[0]


def test_good_answers_are_late_by_the_quiet_p99() -> None:
    samples = [GoodSample("Infer", at, 0.01) for at in (0.0, 1.0, 5.0)]
    samples += [GoodSample("Infer", 6.0, 0.2), GoodSample("OIP", 7.0, 0.01, "differs")]
    quiet, busy, late, faults = report.summarise_good(samples, 4.0, 9.0)
    assert (quiet.answers, busy.answers, busy.wrong, late) == (2, 3, 1, 1)
    assert faults == ("OIP: differs",)


def test_a_quantile_is_of_the_values_between_two_pages() -> None:
    page = '# TYPE lag histogram\nlag_bucket{{le="0.01"}} {}\nlag_bucket{{le="+Inf"}} {}\n'
    before, after = page.format(100, 100), page.format(100, 110)
    assert quantile_between(before, after, "lag", 0.99) == math.inf
    assert quantile_between(before, page.format(200, 200), "lag", 0.99) == 0.01
    assert math.isnan(quantile_between(before, before, "lag", 0.99))
    assert math.isnan(quantile_between("", "", "lag", 0.99))


def stream_response(name: str, error: str = "", *, last: bool = True) -> bytes:
    response = oip.ModelStreamInferResponse(error_message=error)
    response.infer_response.id = name
    response.infer_response.parameters["triton_final_response"].bool_param = last
    if not error:
        response.infer_response.outputs.add(name="token_id", datatype="INT32", shape=[1])
        response.infer_response.raw_output_contents.append(bytes(4))
    return response.SerializeToString()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ([stream_response("a", last=False), stream_response("a"), stream_response("", "no")], ""),
        ([stream_response("a", "INVALID_ARGUMENT: x"), stream_response("", "no")], ""),
        ([stream_response("a"), stream_response("")], "errors without an id"),
        ([stream_response("a"), stream_response("a"), stream_response("", "no")], "one end"),
        ([stream_response("a", last=False), stream_response("", "no")], "one end"),
        ([stream_response("a", "INTERNAL: x"), stream_response("", "no")], "an error of the"),
    ],
)
def test_each_message_of_a_stream_ends_once(body: list[bytes], fault: str) -> None:
    request = oip.ModelInferRequest(id="a").SerializeToString()
    case = Case(0, "wire", ENTRANCES["ModelStreamInfer"], (request, b"\x0a\xff"))
    found = judge(case, Answer("OK", body=body))
    assert fault in found
    assert bool(fault) == bool(found)


async def test_a_campaign_sends_each_index_once_and_not_before_its_time() -> None:
    sent: list[tuple[float, int]] = []

    class Recorder:
        async def send(self, case: Case) -> Answer:
            sent.append((time.monotonic(), case.index))
            return Answer("INVALID_ARGUMENT", "INVALID_ARGUMENT", "text: no")

    started = time.monotonic()
    found = await run_campaign(Recorder(), [GENERATE], 1, range(40), rate=200.0)
    assert found.requests == 40
    assert sorted(index for _, index in sent) == list(range(40))
    assert all(at >= started + index / 200 for at, index in sent)
