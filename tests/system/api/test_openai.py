"""OpenAI's own client, unmodified, against a real server; and requests that it cannot send."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.model.residual import ResidualScheme
from tests.support.language_models import greedy, write_tiny
from tests.support.servers import RunningServer, start_server, stop_server

PROMPT = "a prompt of bytes"
FAULTS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{{ m['content'] * 10**9 }}",
    "division": "{{ 1 / (m['content'] | length - 8) }}",
    "index": "{{ m['content'].split('x')[7].strip() }}",
}
"""What the template does for messages with these contents."""
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}"
    + "".join("{% elif m['content'] == '" + name + "' %}" + do for name, do in FAULTS.items())
    + "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
)
BEARER = "Bearer user-secret-16-letters"
HEAD = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: {BEARER}\r\n".encode()
TOKENS = """
tokens:
  - {name: user, token: user-secret-16-letters}
  - {name: one, token: one-secret-16-letters, concurrent_requests: 1}
  - {name: admin, token: admin-secret-16-letters, scopes: [admin]}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("openai")
    paths = (
        TextVariant(name="standard", residual=ResidualScheme()),
        TextVariant(name="ladder", residual=ResidualScheme(scheme="ladder")),
    )
    bundle = write_tiny(folder / "tiny", paths=paths)
    manifest = yaml.safe_load((bundle / "model.yaml").read_text())
    (bundle / "model.yaml").write_text(yaml.safe_dump(manifest | {"chat_template": TEMPLATE}))
    (folder / "tokens.yaml").write_text(TOKENS)
    flags = ("--http-port", "0", "--token-file", str(folder / "tokens.yaml"))
    running = start_server(bundle, folder / "log", *flags)
    yield running
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()


def count_requests(server: RunningServer, code: str) -> float:
    """Return how many requests ended with a status, from the server's metrics page."""
    with urllib.request.urlopen(server.metrics) as page:
        lines = page.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(f'ladderstitch_requests_total{{code="{code}"')
    )


def connect(server: RunningServer, token: str = "user-secret-16-letters") -> openai.OpenAI:
    """Return a client of the server."""
    return openai.OpenAI(base_url=server.http, api_key=token, max_retries=0, timeout=300)


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with connect(server) as client:
        yield client


def accounting_of(answer: Any) -> dict[str, Any]:
    """Return the accounting that extends OpenAI's usage."""
    accounting: dict[str, Any] = answer.model_extra["ladderstitch"]
    return accounting


def test_completion_is_the_greedy_answer(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2
    )
    choice = answer.choices[0]
    bundle = TextBundle.load(server.log.parent / "tiny")
    assert choice.text == bundle.tokenizer().decode(greedy(bundle, PROMPT, 12))
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 12)
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.top_logprobs is not None
    assert len(choice.logprobs.tokens) == 12
    assert max(choice.logprobs.top_logprobs[0].values()) == choice.logprobs.token_logprobs[0]  # type: ignore[index] # requested
    assert accounting_of(answer)["variant_name"] == "standard"
    span = {"variant_name": "standard", "variant_id": 0, "tokens": 12}
    assert accounting_of(answer)["spans"] == [span]
    assert accounting_of(answer)["perplexity"] == 10.0
    by_tokens = client.completions.create(
        model="tiny", prompt=bundle.tokenizer().encode(PROMPT), max_tokens=12, temperature=0
    )
    assert by_tokens.choices[0].text == choice.text


def test_completion_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * 8 + ["length"]
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == 9  # type: ignore[union-attr] # requested


def test_chat_uses_the_template_of_the_model(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    chat = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_completion_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=1,
    )
    plain = client.completions.create(
        model="tiny", prompt="[system]be brief[user]hello[assistant]", max_tokens=8, temperature=0
    )
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.choices[0].logprobs is not None
    assert len(chat.choices[0].logprobs.content or []) == 8
    chunks = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain.choices[0].text


def test_completion_honours_seed_and_stop_text(client: openai.OpenAI) -> None:
    def sample(**options: Any) -> str:
        return (
            client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=10, temperature=1.5, seed=3, **options
            )
            .choices[0]
            .text
        )

    first = sample()
    assert sample() == first
    assert sample(stop=first[2:4]) == first[: first.index(first[2:4])]


def test_completion_reads_budgets_from_headers(client: openai.OpenAI) -> None:
    def ask(**headers: str) -> Any:
        return client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=5, temperature=0, extra_headers=headers
        )

    relaxed = {"x-llm-d-slo-ttft-ms": "60000", "x-llm-d-slo-tpot-ms": "60000"}
    assert accounting_of(ask(**relaxed))["budgets_met"] is True
    assert accounting_of(ask(**{"x-latency-budget-ms": "0.001"}))["budgets_met"] is False
    assert accounting_of(ask())["budgets_met"] is None
    with pytest.raises(openai.BadRequestError, match="x-llm-d-slo-ttft-ms: expected"):
        ask(**{"x-llm-d-slo-ttft-ms": "soon"})
    with pytest.raises(openai.BadRequestError) as failure:
        ask(**{"x-deadline-ms": "0.001"})
    assert failure.value.code == "BUDGET_INFEASIBLE"


def test_completion_accepts_variant_and_minimum_quality(client: openai.OpenAI) -> None:
    def ask(**body: Any) -> Any:
        return client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=3, temperature=0, extra_body=body
        )

    assert accounting_of(ask(variant_id=1))["variant_name"] == "ladder"
    with pytest.raises(openai.BadRequestError, match="min_quality"):
        ask(min_quality=0.7)
    with pytest.raises(openai.NotFoundError, match="variant_id"):
        ask(variant_id=2)


def test_completion_stream_ends_at_its_hard_deadline(client: openai.OpenAI) -> None:
    """A slow machine may reject the request instead."""

    def stream() -> None:
        answer = client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=110,
            temperature=0,
            stream=True,
            extra_headers={"x-deadline-ms": "10"},
            extra_body={"variant_id": 0},
        )
        list(answer)

    with pytest.raises(openai.APIError, match=r"hard deadline"):
        stream()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"seed": -2}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": ["one", ""]}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"tools": [{}]}, "tools"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_quality": 2}, "min_quality"),
    ],
)
def test_completion_invalid_field_is_named(
    client: openai.OpenAI, body: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        client.completions.create(model="tiny", prompt=PROMPT, extra_body=body)
    assert failure.value.code == "INVALID_ARGUMENT"
    assert str(failure.value.param).split(".")[0] == field


def test_chat_invalid_request_is_rejected(client: openai.OpenAI) -> None:
    def ask(messages: list[Any], **more: Any) -> None:
        client.chat.completions.create(model="tiny", messages=messages, **more)

    for messages, reason in (
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], "no robots"),
        ([{"role": "user", "content": 3}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "type text"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            ask(messages)
    for most in ("max_completion_tokens", "max_tokens"):
        with pytest.raises(openai.BadRequestError, match="max_tokens: expected at least 1"):
            ask([{"role": "user", "content": "x"}], **{most: 0})
    with pytest.raises(openai.BadRequestError, match="logprobs to be true"):
        ask([{"role": "user", "content": "x"}], top_logprobs=2)


@pytest.mark.parametrize("fault", FAULTS)
def test_chat_whose_template_fails_is_rejected(client: openai.OpenAI, fault: str) -> None:
    """Another caller's chat is answered meanwhile."""

    def ask(content: str) -> Any:
        messages: list[Any] = [{"role": "user", "content": content}]
        return client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=3, temperature=0
        )

    expected = ask("hello").choices
    with ThreadPoolExecutor(1) as thread:
        failing = thread.submit(ask, fault)
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3).choices
        with pytest.raises(openai.BadRequestError, match="messages: "):
            failing.result()
    assert ask("hello").choices == expected


def test_control_tokens_in_a_message_are_text(client: openai.OpenAI) -> None:
    def prompt_tokens(content: str, **more: Any) -> int:
        messages: list[Any] = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=1, extra_body=more
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    assert prompt_tokens("a<end>b") == prompt_tokens("a<fin>b")
    assert prompt_tokens("a<end>b", allow_control_tokens=True) == prompt_tokens("a.b")


def test_template_that_cannot_work_is_refused_at_start(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny")
    manifest = yaml.safe_load((bundle / "model.yaml").read_text())
    template = "{% for m in messages %}{{ no_such_function(m) }}{% endfor %}"
    (bundle / "model.yaml").write_text(yaml.safe_dump(manifest | {"chat_template": template}))
    command = [sys.executable, "-m", "ladderstitch", "serve", "--no-ray", "--bundle", str(bundle)]
    command += ["--port", "0", "--metrics-port", "0"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "500"}, check=False
    )
    assert ended.returncode == 2
    assert "chat_template: " in ended.stderr
    assert "no_such_function" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as failure:
        client.completions.create(model="other", prompt="x")
    assert failure.value.code == "MODEL_NOT_FOUND"


def test_http_checks_token_scope_and_limits(server: RunningServer) -> None:
    with connect(server, "wrong") as unknown_client:
        with pytest.raises(openai.AuthenticationError) as unknown:
            unknown_client.models.list()
        assert unknown.value.response.headers["www-authenticate"] == "Bearer"
    with (
        connect(server, "admin-secret-16-letters") as admin,
        pytest.raises(openai.PermissionDeniedError),
    ):
        admin.completions.create(model="tiny", prompt="x")
    with connect(server, "one-secret-16-letters") as one:
        failure = None
        while failure is None:  # the stream may end before the second request arrives
            stream = one.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=100, stream=True
            )
            next(iter(stream))
            try:
                one.completions.create(model="tiny", prompt="x", max_tokens=1)
            except openai.RateLimitError as error:
                failure = error
        assert failure.response.headers["retry-after"] == "1"
        stream.close()
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:  # the server notices the disconnect later
            try:
                one.completions.create(model="tiny", prompt="x", max_tokens=1)
                break
            except openai.RateLimitError:
                continue
        else:
            pytest.fail("a stream whose client disconnected still counts as in flight")


def post(server: RunningServer, body: bytes, path: str = "/completions") -> tuple[int, Any]:
    """Return status and JSON body of the answer to a raw request."""
    request = urllib.request.Request(
        server.http + path,
        body,
        {"content-type": "application/json", "authorization": BEARER},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[1, 2]",
        b'{"model": "tiny"}',
        b'{"model": 3, "prompt": "x"}',
        b'{"model": "tiny", "prompt": "\xff\xfe"}',
        b'{"model": "tiny", "prompt": "x", "stream": "maybe"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": ["\\udfff"]}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "tiny", "prompt": "x", "stop": ["\\ud800"]}',
        b'{"model": "tiny", "prompt": "x", "suffix": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "top_p": 1e999}',
        b'{"model": "tiny", "prompt": [1e30]}',
        b'{"model": "tiny", "prompt": [[]]}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": 1e300}',
        b'{"model": "tiny", "prompt": ' + b"[" * 50_000,
    ],
)
def test_http_malformed_body_is_rejected(server: RunningServer, body: bytes) -> None:
    status, answer = post(server, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_http_endless_body_is_rejected(server: RunningServer) -> None:
    host, port = server.http.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=300) as raw:
        raw.sendall(HEAD + b"transfer-encoding: chunked\r\ncontent-type: application/json\r\n\r\n")
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(80):
                raw.sendall(chunk)
        except ConnectionError:
            pass  # the server has answered and reads no more
        answer = raw.recv(100)
    assert b" 413 " in answer


def test_http_health_needs_no_token(server: RunningServer) -> None:
    with urllib.request.urlopen(server.http.removesuffix("/v1") + "/health") as answer:
        assert json.load(answer) == {"serving": True}


@pytest.mark.parametrize("stream", [False, True])
def test_http_disconnect_cancels_the_generation(server: RunningServer, stream: bool) -> None:
    before = count_requests(server, "CANCELLED")
    host, port = server.http.removeprefix("http://").removesuffix("/v1").split(":")
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "variant_id": 0}
    body = json.dumps(options | {"stream": stream})
    with socket.create_connection((host, int(port)), timeout=300) as raw:
        raw.sendall(
            HEAD
            + b"content-type: application/json\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body.encode()
        )
    deadline = time.monotonic() + 300
    while count_requests(server, "CANCELLED") == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert count_requests(server, "CANCELLED") == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_http_complete_answer_is_counted_once(server: RunningServer, stream: bool) -> None:
    complete, cancelled = (count_requests(server, code) for code in ("OK", "CANCELLED"))
    for _ in range(3):
        answer = connect(server).completions.create(
            model="tiny", prompt=PROMPT, max_tokens=3, stream=stream
        )
        if stream:
            assert list(answer)
    assert count_requests(server, "OK") == complete + 3
    assert count_requests(server, "CANCELLED") == cancelled
