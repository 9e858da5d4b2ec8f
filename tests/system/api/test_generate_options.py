"""The sampling options of gRPC, as the Python client and `ladderstitch generate` offer them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.client import Client, RequestFailed
from tests.support.language_models import END, write_tiny
from tests.support.servers import RunningServer, start_server, stop_server

PROMPT = "once upon a time"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(bundle, tmp_path_factory.mktemp("log") / "server.log")
    yield running
    assert stop_server(running) == 0


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as opened:
        yield opened


def answer(client: Client, **options: Any) -> list[int]:
    return [chunk.token for chunk in client.generate(PROMPT, **{"max_tokens": 12} | options)]


def generate(*arguments: object) -> dict[str, Any]:
    """Return the document of the command, which must succeed."""
    command = ["generate", PROMPT, "--json", *map(str, arguments)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_bias_and_stop_tokens_and_minimum_decide_the_end(client: Client) -> None:
    assert answer(client, logit_bias={65: 100.0}) == [65] * 12
    stopped = answer(client, logit_bias={65: 100.0}, stop_token_ids=[65])
    assert stopped == [65]
    longer = answer(client, logit_bias={65: 100.0}, stop_token_ids=[65], min_tokens=5)
    assert len(longer) > 5
    assert 65 not in longer[:5]
    ended = answer(client, logit_bias={END: 100.0})
    assert ended == [END]
    assert answer(client, logit_bias={END: 100.0}, ignore_end_tokens=True) == [END] * 12


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 10.0}]
)
def test_penalties_are_against_repeated_tokens(client: Client, penalty: dict[str, float]) -> None:
    def repeated(**options: Any) -> int:
        tokens = answer(client, max_tokens=40, logit_bias={66: 1.5, 67: 1.5}, **options)
        return len(tokens) - len(set(tokens))

    assert repeated(**penalty) < repeated()


def test_least_share_of_one_keeps_the_most_likely_token(client: Client) -> None:
    greedy = answer(client)
    hot = {"temperature": 100.0, "seed": 1}
    assert answer(client, **hot) != greedy
    assert answer(client, **hot, min_p=1.0) == greedy


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_answers_match_the_schema_or_the_expression(client: Client, schema: Any) -> None:
    def text(**options: Any) -> str:
        return "".join(chunk.text for chunk in client.generate(PROMPT, max_tokens=40, **options))

    assert json.loads(text(json_schema=schema)) in ({"a": 1}, {"a": 2})
    assert text(regex="(ab){3}") == "ababab"


def test_prompt_has_log_probabilities_if_they_are_asked_for(client: Client) -> None:
    first, *others = client.generate(PROMPT, max_tokens=3, prompt_logprobs=2)
    assert len(first.prompt) == len(PROMPT)
    assert first.prompt[0].logprob is None
    assert all(token.logprob is not None and token.logprob < 0 for token in first.prompt[1:])
    assert all(len(token.alternatives) == 2 for token in first.prompt[1:])
    assert all(chunk.prompt == () for chunk in others)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {65: 101.0}}, "logit_bias"),
        ({"logit_bias": {9999: 1.0}}, "logit_bias"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"json_schema": "{"}, "json_schema"),
        ({"regex": "("}, "regex"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_wrong_option_is_named(client: Client, options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestFailed) as failure:
        answer(client, **options)
    assert list(failure.value.violations) == [field]


def test_two_grammars_are_refused_before_the_call(client: Client) -> None:
    with pytest.raises(ValueError, match="regex: expected none along with json_schema"):
        answer(client, json_schema={"type": "object"}, regex="a")


def test_command_has_the_options_of_the_client(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    address = ("--address", server.address, "--max-tokens", 40)
    for schema in (tmp_path / "schema.json", json.dumps(SCHEMA)):
        found = generate("--json-schema", schema, *address)
        assert json.loads(found["text"]) in ({"a": 1}, {"a": 2})
    assert generate("--regex", "x{4}", *address)["text"] == "xxxx"
    biased = ("--logit-bias", "65=100", "--logit-bias", "66=-100", *address)
    assert generate(*biased)["tokens"] == [65] * 40
    stopped = generate(*biased, "--stop-token", 65, "--stop-token", 66)
    assert stopped["tokens"] == [65]
    assert len(generate(*biased, "--stop-token", 65, "--min-tokens", 3)["tokens"]) > 3
    end = ("--logit-bias", f"{END}=100", *address)
    assert generate(*end)["tokens"] == [END]
    assert generate(*end, "--ignore-end")["tokens"] == [END] * 40
    hot = ("--temperature", 100, "--seed", 1, *address)
    assert generate(*hot, "--min-p", 1)["tokens"] == generate(*address)["tokens"]
    for penalty in ("presence", "frequency", "repetition"):
        penalised = generate(*address, f"--{penalty}-penalty", 2)
        assert penalised["tokens"] != generate(*address)["tokens"], penalty


def test_local_model_has_the_same_options(bundle: Path) -> None:
    local = ["generate", PROMPT, "--local", "--model", str(bundle), "--max-tokens", "40"]
    done = CliRunner().invoke(app, [*local, "--regex", "(ab){3}"])
    assert done.exit_code == 0, done.output
    assert done.stdout == "ababab\n"
    wrong = CliRunner().invoke(app, [*local, "--json-schema", '{"type": 7}'])
    assert wrong.exit_code == 1
    assert "json_schema: expected a supported json schema" in " ".join(wrong.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logit-bias", "65:1"], "logit-bias: expected TOKEN=BIAS, such as 17=-100, got '65:1'"),
        (["--logit-bias", "a=1"], "logit-bias: expected TOKEN=BIAS, such as 17=-100, got 'a=1'"),
        (["--json-schema", "absent.json"], "json-schema: expected a file of JSON, or its text"),
        (["--json-schema", "{"], "json-schema: expected a file of JSON, or its text, got '{'"),
        (["--json-schema", "{}", "--regex", "a"], "regex: expected none along with --json-schema"),
    ],
)
def test_wrong_usage_names_the_option(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["generate", PROMPT, *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
