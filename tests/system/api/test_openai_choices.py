"""Prompt lists, several choices, echo, sampling rules, JSON and tools, by OpenAI's own client."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx2
import jsonschema
import openai
import pytest
import torch
import transformers

from ladderstitch.v1 import generation_pb2, generation_pb2_grpc
from tests.support.language_models import END
from tests.support.servers import RunningServer, start_server, stop_server
from tests.system.api.openai_model import (
    log_probabilities,
    transformers_model,
    write_tool_bundle,
)

PROMPT = "a prompt of bytes"
SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "name": {"type": "string", "maxLength": 6},
        "legs": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["age", "kind", "name", "legs"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weigh", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "call", "parameters": {"type": "object"}}},
]
USER: list[Any] = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("choices")
    flags = ("--http-port", "0", "--log-requests")
    running = start_server(write_tool_bundle(folder / "tiny"), folder / "log", *flags)
    yield running
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def reference(server: RunningServer) -> transformers.LlamaForCausalLM:
    return transformers_model(server.log.parent / "tiny")


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.http, api_key="x", max_retries=0, timeout=300) as client:
        yield client


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    """Return a greedy completion of 8 tokens."""
    defaults = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    return client.completions.create(**defaults | fields)


def test_prompt_lists_are_answered_in_order(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "another", "b"]
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    assert len(set(alone)) == 3
    for given in (prompts, [list(prompt.encode()) for prompt in prompts]):
        ids = [[byte_id(b) for b in p] if isinstance(p, list) else p for p in given]
        answer = complete(client, prompt=ids)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage.prompt_tokens == sum(map(len, prompts))
        assert answer.usage.completion_tokens == 24
    ids = [byte_id(b) for b in PROMPT.encode()]
    assert complete(client, prompt=ids).choices[0].text == alone[0]


def byte_id(byte: int) -> int:
    """Return the token of a byte in the tiny vocabulary, which is sorted by character."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))
    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(split[0][0])


def test_n_choices_equal_answers_with_following_seeds(client: openai.OpenAI) -> None:
    sampled = {"temperature": 1.0, "seed": 5, "prompt": [PROMPT, "b"]}
    answer = complete(client, n=3, **sampled)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    for number in range(3):
        alone = complete(client, **sampled | {"seed": 5 + number})
        assert alone.choices[0].text == answer.choices[number].text
        assert alone.choices[1].text == answer.choices[3 + number].text
    assert len({choice.text for choice in answer.choices}) == 6
    streamed: dict[int, str] = {}
    finished = []
    for chunk in complete(
        client, n=3, stream=True, stream_options={"include_usage": True}, **sampled
    ):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
            finished += [choice.index] if choice.finish_reason else []
        usage = chunk.usage
    assert [streamed[i] for i in range(6)] == [choice.text for choice in answer.choices]
    assert sorted(finished) == list(range(6))
    assert usage == answer.usage


def test_best_of_returns_the_likeliest(client: openai.OpenAI) -> None:
    sampled = {"temperature": 1.5, "seed": 3, "logprobs": 0}
    every = complete(client, n=6, **sampled).choices
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in every]
    order = sorted(range(6), key=lambda number: -means[number])
    best = complete(client, n=2, best_of=6, **sampled)
    assert [choice.text for choice in best.choices] == [every[n].text for n in order[:2]]
    assert best.usage.completion_tokens == 48


@pytest.mark.parametrize("length", [1, 2, 31, 33, 70, 300])
def test_echo_reports_the_log_probabilities_of_the_prompt(
    client: openai.OpenAI, reference: transformers.LlamaForCausalLM, length: int
) -> None:
    """Prompts of several steps, and after the same prompt was cached."""
    text = (PROMPT * 20)[:length]
    ids = [byte_id(b) for b in text.encode()]
    expected = log_probabilities(reference, ids)
    for max_tokens in (1, 0):
        answer = complete(client, prompt=text, max_tokens=max_tokens, echo=True, logprobs=2)
        found = answer.choices[0].logprobs
        assert len(found.tokens) == length + max_tokens
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        following = [float(expected[n, ids[n + 1]]) for n in range(length - 1)]
        assert found.token_logprobs[1:length] == pytest.approx(following, abs=1e-3)
        assert answer.choices[0].text.startswith(text)
        assert answer.usage.completion_tokens == max_tokens
        for number in range(1, length):
            best = max(found.top_logprobs[number].values())
            assert best == pytest.approx(float(expected[number - 1].max()), abs=1e-3)
            assert text[found.text_offset[number]] == found.tokens[number]


def test_echo_without_log_probabilities_begins_with_the_prompt(client: openai.OpenAI) -> None:
    alone = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + alone
    chunks = list(complete(client, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + alone
    ids = [byte_id(b) for b in PROMPT.encode()]
    assert complete(client, prompt=ids, echo=True, n=2).choices[1].text == PROMPT + alone


RULES: list[dict[str, Any]] = [
    {"extra_body": {"repetition_penalty": 1.7}},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.9, "presence_penalty": -0.4},
    {"logit_bias": {"65": 30, "66": -100}},
    {"extra_body": {"min_tokens": 30}, "logit_bias": {str(END): 100}},
    {"extra_body": {"repetition_penalty": 1.3, "min_tokens": 7}, "logit_bias": {str(END): 9}},
]


@pytest.mark.parametrize("rules", RULES)
def test_rules_change_logits_as_in_transformers(
    client: openai.OpenAI, reference: transformers.LlamaForCausalLM, rules: dict[str, Any]
) -> None:
    extra = rules.get("extra_body", {})
    answer = complete(client, max_tokens=40, logprobs=0, **rules)
    prompt = [byte_id(b) for b in PROMPT.encode()]
    processors = transformers.LogitsProcessorList()
    if "repetition_penalty" in extra:
        processor = transformers.RepetitionPenaltyLogitsProcessor(extra["repetition_penalty"])
        processors.append(processor)
    tokens, biases = list(prompt), rules.get("logit_bias", {})
    while len(tokens) < len(prompt) + 40:
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits
        scores = logits[:, -1].clone()
        scores = processors(torch.tensor([tokens]), scores)
        for token in set(tokens[len(prompt) :]):  # OpenAI's documentation of the two penalties
            count = tokens[len(prompt) :].count(token)
            scores[0, token] -= rules.get("frequency_penalty", 0.0) * count
            scores[0, token] -= rules.get("presence_penalty", 0.0)
        if biases:
            scores[0, [int(t) for t in biases]] += torch.tensor(list(biases.values()))
        if minimum := extra.get("min_tokens"):
            processor = transformers.MinNewTokensLengthLogitsProcessor(len(prompt), minimum, END)
            scores = processor(torch.tensor([tokens]), scores)
        tokens.append(int(scores.argmax()))
        if tokens[-1] == END:
            break
    assert answer.usage.completion_tokens == len(tokens) - len(prompt)
    decoder = reference_texts()
    texts = [decoder[t] for t in tokens[len(prompt) :]]
    assert answer.choices[0].logprobs.tokens == texts


def reference_texts() -> dict[int, str]:
    """Return the name of each token in log probabilities."""
    names = {byte_id(b): chr(b) if b < 128 else f"bytes:\\x{b:02x}" for b in range(128)}
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for b in range(128, 256):
        printable = 0xA1 <= b <= 0xAC or b >= 0xAE
        others = [
            o for o in range(256) if not (0x21 <= o <= 0x7E or 0xA1 <= o <= 0xAC or o >= 0xAE)
        ]
        character = chr(b) if printable else chr(0x100 + others.index(b))
        names[alphabet.index(character)] = f"bytes:\\x{b:02x}"
    return names | {END: "<end>"}


def test_stop_tokens_end_the_answer_unless_the_minimum_is_not_reached(
    client: openai.OpenAI,
) -> None:
    answer = complete(client, max_tokens=30, logprobs=0)
    names = {text: token for token, text in reference_texts().items()}
    tokens = answer.choices[0].logprobs.tokens
    stop = names[tokens[5]]
    first = tokens.index(tokens[5])
    ended = complete(client, max_tokens=30, logprobs=0, extra_body={"stop_token_ids": [stop]})
    assert ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].logprobs.tokens == tokens[: first + 1]
    body = {"stop_token_ids": [stop], "min_tokens": first + 3}
    later = complete(client, max_tokens=30, logprobs=0, extra_body=body)
    assert later.usage.completion_tokens >= first + 3
    assert tokens[5] not in later.choices[0].logprobs.tokens[: first + 2]
    bias = {str(END): 100}
    assert complete(client, logit_bias=bias).usage.completion_tokens == 1
    ignored = complete(client, logit_bias=bias, extra_body={"ignore_eos": True})
    assert (ignored.usage.completion_tokens, ignored.choices[0].finish_reason) == (8, "length")


@pytest.mark.parametrize("seed", range(4))
def test_json_schema_is_followed(client: openai.OpenAI, seed: int) -> None:
    format_: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model="tiny", messages=USER, temperature=1.5, seed=seed, response_format=format_
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)
    text = complete(
        client, temperature=1, seed=seed, max_tokens=300, extra_body={"response_format": format_}
    )
    jsonschema.validate(json.loads(text.choices[0].text), SCHEMA)


def test_json_mode_writes_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=USER,
        temperature=0,
        logit_bias={str(byte_id(ord("}"))): 60, str(byte_id(ord('"'))): 50},
        response_format={"type": "json_object"},
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_structured_output_of_openai_parses(client: openai.OpenAI) -> None:
    from pydantic import BaseModel, Field

    class Pet(BaseModel):
        age: int = Field(ge=0, le=99)
        good: bool

    answer = client.chat.completions.parse(
        model="tiny", messages=USER, temperature=2, seed=1, response_format=Pet
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weigh"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_forced_tool_call_matches_its_schema(
    client: openai.OpenAI, choice: Any, stream: bool
) -> None:
    tools = TOOLS[:1]
    common: Any = {"model": "tiny", "messages": USER, "tools": tools, "tool_choice": choice}
    common |= {"temperature": 1.5, "seed": 2}
    if stream:
        deltas = [c.choices[0] for c in client.chat.completions.create(stream=True, **common)]
        (call,) = [call for delta in deltas for call in delta.delta.tool_calls or []]
        assert call.index == 0
        finish = deltas[-1].finish_reason
        assert not any(delta.delta.content for delta in deltas)
    else:
        answer = client.chat.completions.create(**common)
        (call,) = answer.choices[0].message.tool_calls or []
        finish = answer.choices[0].finish_reason
        assert answer.choices[0].message.content is None
    assert (call.function.name, finish) == ("weigh", "tool_calls")
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    result: list[Any] = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude={"index"})]},
        {"role": "tool", "tool_call_id": call.id, "content": "3 kg"},
    ]
    assert client.chat.completions.create(
        model="tiny", messages=result, tools=tools, max_tokens=3
    ).choices


def test_free_answer_with_tools_is_text(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> Any:
        common: Any = {"model": "tiny", "messages": USER, "max_tokens": 9, "temperature": 0}
        return client.chat.completions.create(**common | fields)

    with_tools = ask(tools=TOOLS, tool_choice="auto")
    assert with_tools.choices[0].message.content
    assert with_tools.choices[0].message.tool_calls is None
    assert with_tools.usage.prompt_tokens > ask().usage.prompt_tokens
    assert ask(tools=TOOLS, tool_choice="none").choices == ask().choices


def generate(server: RunningServer, **fields: Any) -> list[generation_pb2.GenerateResponse]:
    """Return the responses of the own protocol to a prompt."""
    request = generation_pb2.GenerateRequest(text=PROMPT, **fields)
    with grpc.insecure_channel(server.address) as channel:
        return list(generation_pb2_grpc.GenerationServiceStub(channel).Generate(request))


def test_own_protocol_has_the_same_options(server: RunningServer, client: openai.OpenAI) -> None:
    rules: dict[str, Any] = {"presence_penalty": 0.7, "frequency_penalty": 0.3}
    extra = {"repetition_penalty": 1.2, "min_tokens": 20, "stop_token_ids": [9]}
    expected = complete(
        client,
        max_tokens=40,
        echo=True,
        logprobs=2,
        logit_bias={"70": 2},
        extra_body=extra,
        **rules,
    ).choices[0]
    bias = [generation_pb2.TokenBias(token_id=70, bias=2)]
    found = generate(
        server, max_tokens=40, logprobs=2, prompt_logprobs=2, logit_bias=bias, **extra, **rules
    )
    assert PROMPT + "".join(response.text for response in found) == expected.text
    scored = [*found[0].prompt_tokens, *found]
    assert [token.logprob for token in scored[1:]] == expected.logprobs.token_logprobs[1:]
    assert not scored[0].HasField("logprob")
    assert not any(response.prompt_tokens for response in found[1:])
    text = "".join(r.text for r in generate(server, max_tokens=90, regex="[ab]{3}-(x|yy)+z"))
    assert re.fullmatch("[ab]{3}-(x|yy)+z", text)
    words = generate(server, max_tokens=400, temperature=1, seed=3, json_schema=json.dumps(SCHEMA))
    jsonschema.validate(json.loads("".join(response.text for response in words)), SCHEMA)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("regex", "("),
        ("json_schema", '{"type": "nope"}'),
        ("json_schema", "x" * 70_000),
        ("min_p", 1.5),
        ("presence_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("logit_bias", [generation_pb2.TokenBias(token_id=999, bias=1)]),
        ("logit_bias", [generation_pb2.TokenBias(token_id=1, bias=float("inf"))]),
        ("min_tokens", -1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1] * 129),
        ("prompt_logprobs", 21),
        ("answer_so_far", generation_pb2.AnswerSoFar(token_ids=[1] * 8)),
        ("answer_so_far", generation_pb2.AnswerSoFar(token_ids=[999])),
    ],
)
def test_own_protocol_refuses_bad_values(server: RunningServer, field: str, value: Any) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        generate(server, **{"max_tokens": 8, field: value})
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details().startswith(f"INVALID_ARGUMENT: {field}: expected")


@pytest.mark.parametrize("given", ["x", [{"role": "user", "content": "x"}]])
def test_response_is_the_answer_of_the_chat(client: openai.OpenAI, given: Any) -> None:
    options: Any = {"model": "tiny", "temperature": 0}
    chat = client.chat.completions.create(
        messages=[{"role": "system", "content": "s"}, *USER], max_tokens=9, **options
    )
    options |= {"input": given, "instructions": "s", "max_output_tokens": 9}
    response = client.responses.create(**options)
    assert response.output_text == chat.choices[0].message.content
    ends = {"length": "incomplete", "stop": "completed"}
    assert response.status == ends[chat.choices[0].finish_reason]
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.output_tokens == chat.usage.completion_tokens
    with client.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == response.output_text
    assert kinds[0] == "response.created"
    assert kinds.count("response.output_text.delta") == chat.usage.completion_tokens
    parsed = client.responses.create(
        **options | {"max_output_tokens": 300, "temperature": 1.5},
        text={"format": {"type": "json_schema", "name": "pet", "schema": SCHEMA}},
    )
    jsonschema.validate(json.loads(parsed.output_text), SCHEMA)
    assert parsed.status == "completed"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", []),
        ("input", 3),
        ("input", [{"role": "user", "content": [{"type": "input_image"}]}]),
        ("previous_response_id", "resp_1"),
        ("tools", TOOLS),
        ("max_output_tokens", 0),
        ("text", {"format": {"type": "json_schema", "schema": {"type": "nope"}}}),
        ("stream", "yes"),
    ],
)
def test_bad_response_request_is_refused_by_name(
    server: RunningServer, field: str, value: Any
) -> None:
    body = {"model": "tiny", "input": "x"} | {field: value}
    answer = httpx2.post(f"{server.http}/responses", json=body, timeout=300)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].split(".")[0] == field


def test_embeddings_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="model: expected one with embeddings"):
        client.embeddings.create(model="tiny", input="x")


def test_requests_have_ids_in_answers_and_in_the_log(
    client: openai.OpenAI, server: RunningServer
) -> None:
    raw = client.completions.with_raw_response
    own = raw.create(
        model="tiny", prompt="x", max_tokens=1, extra_headers={"x-request-id": "own id 7"}
    )
    assert own.headers["x-request-id"] == "own id 7"
    made = raw.create(model="tiny", prompt="x", max_tokens=1, stream=True)
    assert len(made.headers["x-request-id"]) == 32
    assert list(made.parse())
    with pytest.raises(openai.NotFoundError) as missing:
        raw.create(model="none", prompt="x")
    assert missing.value.request_id
    lines = [
        "request_id=own id 7 method=POST /v1/completions model=tiny code=OK",
        f"request_id={missing.value.request_id} method=POST /v1/completions model= code=NOT",
    ]
    end = time.monotonic() + 300
    while not all(line in server.log.read_text() for line in lines):  # written after the answer
        assert time.monotonic() < end, f"not logged: {lines}"
        time.sleep(0.05)


def test_metrics_are_on_the_http_port_as_well(server: RunningServer) -> None:
    page = httpx2.get(server.http.removesuffix("/v1") + "/metrics", timeout=300)
    assert page.headers["content-type"].startswith("text/plain")
    assert "ladderstitch_requests_total" in page.text


DEEP: Any = {"type": "integer"}
for _ in range(450):
    DEEP = {"type": "array", "items": DEEP}
BAD: list[tuple[str, Any]] = [
    *(("n", value) for value in (0, 129, -1, "2", 1.5, True, [1])),
    *(("presence_penalty", value) for value in (2.1, -3, "1", [1], True)),
    *(("frequency_penalty", value) for value in (2.1, -3, "1", {})),
    *(("repetition_penalty", value) for value in (0, -1, 11, "1", [])),
    *(("min_p", value) for value in (-0.1, 1.1, "0.5")),
    *(
        ("logit_bias", value)
        for value in ({"a": 1}, {"-1": 1}, {"257": 1}, {"1": 101}, {"9" * 40: 1})
    ),
    *(("logit_bias", value) for value in ([], "x", {"1": "x"}, {"1": None}, {"\u0661": 1})),
    *(("min_tokens", value) for value in (-1, 9, "1", 1.5, [])),
    *(("stop_token_ids", value) for value in ([257], [-1], ["1"], 1, "x", [1.5], [0] * 129)),
    *(("ignore_eos", value) for value in (1, "true", [])),
    *(
        ("response_format", value)
        for value in ("json", {"type": "xml"}, {}, {"type": "json_schema"})
    ),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": [1]}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": False}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": DEEP}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://a/b"}}}),
]
BAD_COMPLETION: list[tuple[str, Any]] = [
    *(("echo", value) for value in (1, "true", [])),
    *(("best_of", value) for value in (0, 129, "2", 1.5)),
    *(("prompt", value) for value in ([], [[]], ["x"] * 129, [["x"]], [1, "x"], [[1], "x"], {})),
    ("logprobs", 21),
]
BAD_CHAT: list[tuple[str, Any]] = [
    *(("tools", value) for value in ("x", [1], [{}], [{"type": "x"}], [{"type": "function"}])),
    ("tools", [{"type": "function", "function": {"name": "a b"}}]),
    ("tools", [{"type": "function", "function": {"name": "a", "parameters": [1]}}]),
    ("tools", TOOLS[:1] * 2),
    *(("tool_choice", value) for value in ("required", "maybe", {"type": "function"}, 3)),
    ("parallel_tool_calls", "yes"),
    ("top_logprobs", 21),
]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [("completions", *case) for case in BAD + BAD_COMPLETION]
    + [("chat/completions", *case) for case in BAD + BAD_CHAT],
)
def test_bad_value_is_refused_by_name(
    server: RunningServer, path: str, field: str, value: Any
) -> None:
    prompt: Any = {"messages": USER} if "chat" in path else {"prompt": "x"}
    body = {"model": "tiny", "max_tokens": 8, "logprobs": "chat" in path or 1} | prompt
    answer = httpx2.post(f"{server.http}/{path}", json=body | {field: value}, timeout=300)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].split(".")[0] == field, error
    assert error["type"] == "invalid_request_error"


def test_many_log_probabilities_are_refused(server: RunningServer) -> None:
    body = {"model": "tiny", "prompt": ["x"] * 128, "logprobs": 20, "max_tokens": 400}
    answer = httpx2.post(f"{server.http}/completions", json=body, timeout=300)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"] == (
        "logprobs: expected at most 1048576 log probabilities of all answers together, got up to "
        "1075200; lower n, max_tokens or logprobs, or send fewer prompts"
    )


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("stop", 1, "stop: Input should be a valid string"),
        ("stop", "\ud800", "stop: expected Unicode text, got a lone surrogate"),
        ("prompt", [[1], "x"], "prompt: Input should be a valid string"),
        ("logit_bias", {"A": "x"}, "logit_bias: Input should be a valid number"),
        ("stop_token_ids", [1, "x"], "stop_token_ids.1: Input should be a valid integer"),
    ],
)
def test_field_of_several_types_is_refused_by_its_own_name(
    server: RunningServer, field: str, value: Any, error: str
) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x"} | {field: value})
    headers = {"content-type": "application/json"}
    address = f"{server.http}/completions"
    answer = httpx2.post(address, content=body, headers=headers, timeout=300)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"] == error
    assert answer.json()["error"]["param"] == error.partition(":")[0]
