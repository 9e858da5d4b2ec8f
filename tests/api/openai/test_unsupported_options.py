"""Options that are not supported are rejected by name, unless their value changes nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ladderstitch.api.openai.requests import UNSUPPORTED
from ladderstitch.text.bundle import TextBundle
from tests.api.openai.served_model import AsgiCall, ServedModel, write_chat_bundle

WRONG: dict[str, Any] = {
    "n": 2,
    "best_of": 2,
    "echo": True,
    "suffix": "x",
    "use_beam_search": True,
    "logit_bias": {"65": -100},
    "logits_processors": ["x"],
    "allowed_token_ids": [65],
    "bad_words": ["x"],
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "length_penalty": 2,
    "repetition_detection": {"min_count": 2},
    "min_p": 0.1,
    "typical_p": 0.9,
    "watermarking": True,
    "min_tokens": 1,
    "ignore_eos": True,
    "stop_token_ids": [65],
    "include_stop_str_in_output": True,
    "max_completion_tokens": 5,
    "top_logprobs": 2,
    "prompt_logprobs": 0,
    "logprob_token_ids": [65],
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["a"]},
    "structural_tag": "{}",
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a", "b"],
    "guided_grammar": "root ::= 'a'",
    "guided_decoding_backend": "xgrammar",
    "guided_whitespace_pattern": " ",
    "reasoning_effort": "high",
    "thinking_token_budget": 5,
    "verbosity": "low",
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "web_search_options": {},
    "moderation": {"model": "x"},
    "prompt_embeds": "AAAA",
    "documents": [{"title": "x", "text": "y"}],
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "mm_processor_kwargs": {"x": 1},
    "media_io_kwargs": {"video": {}},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": False,
    "truncate_prompt_tokens": 5,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "return_prompt_text": True,
    "stream_interval": 2,
    "stream_options.continuous_usage_stats": True,
    "priority": 1,
    "cache_salt": "x",
    "kv_transfer_params": {"x": 1},
    "ec_transfer_params": {"x": 1},
    "vllm_xargs": {"x": 1},
    "messages.tool_calls": [{"id": "x"}],
    "messages.tool_call_id": "x",
    "messages.function_call": {"name": "f"},
    "messages.audio": {"id": "x"},
}
"""A value of every unsupported option that would change the answer."""
SUPPORTED_IN_CHATS = {"max_completion_tokens", "top_logprobs"}
OPPOSITE_IN_CHATS = "add_special_tokens"
"""An option whose default is true for completions and false for chats."""
CASES = [(False, option) for option in WRONG if not option.startswith("messages.")]
CASES += [(True, option) for option in WRONG if option not in SUPPORTED_IN_CHATS]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    return write_chat_bundle(tmp_path_factory.mktemp("openai"))


def fields_of(option: str, value: Any) -> dict[str, Any]:
    """Return the fields of a body that set an option."""
    part, _, name = option.rpartition(".")
    if part == "messages":
        return {"messages": [{"role": "user", "content": "x", name: value}]}
    return {part: {name: value}} if part else {name: value}


async def ask(bundle: TextBundle, chat: bool, **fields: Any) -> tuple[int, Any]:
    """Return the status and the body of an answer of two tokens."""
    served = ServedModel(bundle)
    served.scheduler.steps.release()
    call = AsgiCall(chat, **{"max_tokens": 2} | fields)
    await call.run(served, lambda message: None)
    await served.scheduler.close()
    served.assert_released()
    return call.sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in call.sent))


def test_every_unsupported_option_has_a_wrong_value() -> None:
    assert set(WRONG) == set(UNSUPPORTED)
    assert not [name for name, value in WRONG.items() if value in UNSUPPORTED[name]]


@pytest.mark.parametrize(("chat", "option"), CASES)
async def test_unsupported_option_is_rejected_by_name(
    bundle: TextBundle, chat: bool, option: str
) -> None:
    value = True if chat and option == OPPOSITE_IN_CHATS else WRONG[option]
    status, answer = await ask(bundle, chat, **fields_of(option, value))
    assert (status, answer["error"]["param"]) == (400, option)
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["code"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(("chat", "option"), CASES)
async def test_neutral_values_and_null_are_accepted(
    bundle: TextBundle, chat: bool, option: str
) -> None:
    for value in (None, *UNSUPPORTED[option]):
        if chat and option == OPPOSITE_IN_CHATS and value:
            value = False
        status, answer = await ask(bundle, chat, **fields_of(option, value))
        assert (status, answer.get("error")) == (200, None)
        assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("chat", [False, True])
async def test_null_and_default_of_supported_fields_are_accepted(
    bundle: TextBundle, chat: bool
) -> None:
    names = ("stream", "stream_options", "logprobs", "temperature", "top_k", "top_p", "seed")
    nulls: dict[str, Any] = dict.fromkeys((*names, "stop", "variant_id"))
    assert (await ask(bundle, chat, **nulls))[0] == 200
    defaults = {"top_k": -1, "top_p": 1, "stop": [], "stream": False}
    assert (await ask(bundle, chat, **defaults))[0] == 200
    usage_null = {"stream_options": {"include_usage": None}}
    assert (await ask(bundle, chat, **usage_null))[0] == 200


@pytest.mark.parametrize("chat", [False, True])
async def test_fields_that_change_no_answer_are_ignored(bundle: TextBundle, chat: bool) -> None:
    ignored = {"user": "x", "metadata": {"a": "b"}, "store": True, "something_new": 3}
    status, answer = await ask(bundle, chat, **ignored)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 2
