"""Options that are not supported are rejected by name, unless their value changes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ladderstitch.api.openai.bodies import ChatMessage, ChatRequest, CompletionRequest
from ladderstitch.api.openai.fields import StreamOptions
from ladderstitch.api.openai.options import HARMLESS, UNSUPPORTED
from ladderstitch.scheduling.sampling import GREEDY, Sampling
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import SamplingDefaults
from tests.api.openai.served_model import AsgiCall, ServedModel, write_chat_bundle

WRONG: dict[str, Any] = {
    "best_of": 2,
    "echo": True,
    "suffix": "x",
    "use_beam_search": True,
    "logits_processors": ["x"],
    "allowed_token_ids": [65],
    "bad_words": ["x"],
    "length_penalty": 2,
    "repetition_detection": {"min_count": 2},
    "typical_p": 0.9,
    "watermarking": True,
    "include_stop_str_in_output": True,
    "max_completion_tokens": 5,
    "top_logprobs": 2,
    "prompt_logprobs": 0,
    "logprob_token_ids": [65],
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
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
    "guided_json_object": True,
    "regex": "a+",
    "ebnf": "root ::= 'a'",
    "grammar": "root ::= 'a'",
    "json_schema": "{}",
    "stop_regex": ["a"],
    "stop_sequences": ["a"],
    "stop_strings": ["a"],
    "eos_token_id": 65,
    "end_id": 65,
    "no_stop_trim": True,
    "do_sample": False,
    "num_beams": 2,
    "beam_width": 2,
    "num_return_sequences": 2,
    "early_stopping": True,
    "diversity_penalty": 0.5,
    "exponential_decay_length_penalty": [1, 1.1],
    "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.1,
    "repeat_penalty": 1.1,
    "top_a": 0.1,
    "tfs_z": 0.9,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "penalty_alpha": 0.5,
    "guidance_scale": 2,
    "mirostat": 2,
    "mirostat_mode": 2,
    "dynatemp_range": 0.5,
    "dry_multiplier": 0.8,
    "xtc_probability": 0.5,
    "smoothing_factor": 0.3,
    "top_p_decay": 0.9,
    "top_p_min": 0.1,
    "sampling_seed": 1,
    "random_seed": 1,
    "samplers": ["top_k"],
    "bad_words_ids": [[65]],
    "suppress_tokens": [65],
    "begin_suppress_tokens": [65],
    "sequence_bias": [[[65], 1.0]],
    "custom_logit_processor": "x",
    "max_new_tokens": 5,
    "max_length": 5,
    "max_output_tokens": 5,
    "n_predict": 5,
    "num_predict": 5,
    "min_new_tokens": 5,
    "min_length": 5,
    "n_probs": 5,
    "top_n_tokens": 5,
    "return_full_text": True,
    "decoder_input_details": True,
    "return_hidden_states": True,
    "detokenize": False,
    "truncate": 5,
    "truncation": "auto",
    "input_ids": [65],
    "system": "x",
    "instructions": "x",
    "options": {"num_ctx": 5},
    "tool_prompt": "x",
    "transforms": ["middle-out"],
    "adapter_id": "x",
    "lora_path": "x",
    "lora_request": {"name": "x"},
    "session_params": {"id": "x"},
    "disaggregated_params": {"x": 1},
    "enable_thinking": False,
    "thinking": {"type": "enabled"},
    "thinking_budget": 5,
    "reasoning": {"effort": "high"},
    "messages.function_call": {"name": "f"},
    "messages.audio": {"id": "x"},
}
"""A value of every unsupported option that would change the answer."""
SUPPORTED_IN_CHATS = {"max_completion_tokens", "top_logprobs", "tools", "tool_choice"}
SUPPORTED_IN_COMPLETIONS = {"echo", "best_of"}
OPPOSITE_IN_CHATS = "add_special_tokens"
"""An option whose default is true for completions and false for chats."""
DOCS = Path(__file__).parents[3] / "docs" / "openai.md"
REFUSED = [option for option in WRONG if option not in SUPPORTED_IN_COMPLETIONS]
CASES = [(False, option) for option in REFUSED if not option.startswith("messages.")]
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


@pytest.mark.parametrize("chat", [False, True])
async def test_neutral_values_and_null_are_accepted(bundle: TextBundle, chat: bool) -> None:
    """All options at once: an error would name the one that it is about."""
    names = [option for is_chat, option in CASES if is_chat == chat]
    most = max(len(UNSUPPORTED[name]) for name in names)
    for number in range(-1, most):
        body: dict[str, Any] = {}
        for name in names:
            neutral = [None, *UNSUPPORTED[name]][: number + 2][-1]
            if (chat, name) == (True, OPPOSITE_IN_CHATS) and neutral:
                neutral = False
            fields = fields_of(name, neutral)
            if "messages" in fields and "messages" in body:
                body["messages"][0] |= fields["messages"][0]
            else:
                body |= fields
        status, answer = await ask(bundle, chat, **body)
        assert (status, answer.get("error")) == (200, None)
        assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("chat", [False, True])
async def test_null_is_as_if_every_optional_field_was_absent(
    bundle: TextBundle, chat: bool
) -> None:
    fields = (ChatRequest if chat else CompletionRequest).model_fields
    optional = [name for name, field in fields.items() if not field.is_required()]
    assert {"min_quality", "stream", "logprobs", "stop", "max_tokens"} <= {*optional}
    default = await ask(bundle, chat)
    for name in optional:
        status, answer = await ask(bundle, chat, **{name: None})
        assert (status, answer.get("error")) == (200, None), name
    nulls: dict[str, Any] = dict.fromkeys((*optional, *UNSUPPORTED, *HARMLESS, "unknown"))
    status, answer = await ask(bundle, chat, **nulls | {"max_tokens": 2, "temperature": 0})
    assert status == 200
    assert answer["choices"] == default[1]["choices"]
    inner = {"include_usage": None, "include_obfuscation": None, "unknown": None}
    assert (await ask(bundle, chat, stream_options=inner))[0] == 200


async def test_null_fields_of_a_message_are_as_if_absent(bundle: TextBundle) -> None:
    names = [*ChatMessage.model_fields, "name", "refusal", "tool_calls", "tool_call_id"]
    nulls = dict.fromkeys(names) | {"role": "assistant"}
    parts = [{"type": "text", "text": None}, {"type": "text", "text": "x"}]
    messages = [{"role": "user", "content": parts}, nulls]
    status, answer = await ask(bundle, True, messages=messages)
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize("chat", [False, True])
async def test_values_of_other_servers_mean_the_same(bundle: TextBundle, chat: bool) -> None:
    for fields in (
        {"top_p": 0},
        {"top_p": 0.0, "temperature": 1.5, "seed": 3},
        {"top_k": -1},
        {"top_k": 0},
        {"seed": -1},
        {"seed": -1, "top_p": 0, "top_k": -1, "temperature": 2},
        {"seed": 2**63},
        {"top_p": 1, "stop": [], "stream": False},
    ):
        assert (await ask(bundle, chat, **fields))[0] == 200, fields
    for wrong in ({"top_p": -0.1}, {"top_p": 1.1}, {"top_k": -2}, {"seed": -2}):
        status, answer = await ask(bundle, chat, **wrong)
        assert (status, answer["error"]["param"]) == (400, *wrong)
    status, answer = await ask(bundle, chat, top_p=0, temperature=-1)
    assert (status, answer["error"]["param"]) == (400, "temperature")


def test_top_p_of_zero_is_greedy_and_seed_of_minus_one_random() -> None:
    def sampling(**fields: Any) -> Sampling:
        return CompletionRequest(model="m", prompt="x", **fields).sampling(SamplingDefaults())

    assert sampling(top_p=0, temperature=2, seed=5) == GREEDY
    assert sampling(seed=-1).seed is None
    assert sampling(top_k=-1).top_k == 0
    assert sampling(seed=0).seed == 0


@pytest.mark.parametrize("chat", [False, True])
async def test_fields_that_change_no_answer_are_ignored(bundle: TextBundle, chat: bool) -> None:
    default = await ask(bundle, chat)
    for name in (*HARMLESS, "something_new"):
        for value in ("x", {"a": "b"}, True, [1]):
            if isinstance(value, str) and name != "user":
                continue
            status, answer = await ask(bundle, chat, **fields_of(name, value))
            assert (status, answer["choices"]) == (200, default[1]["choices"]), name


def options_in_docs(treatment: str) -> set[str]:
    """Return the options of a row of the table in the documentation."""
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| {treatment}"))
    return set(re.findall(r"`([^`]+)`", row))


def test_table_of_options_in_the_documentation_is_complete() -> None:
    honoured = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    honoured |= {f"stream_options.{name}" for name in StreamOptions.model_fields}
    honoured |= {f"messages.{name}" for name in ChatMessage.model_fields} | {"messages.name"}
    honoured -= {"stream_options", "messages", OPPOSITE_IN_CHATS}
    assert options_in_docs("honoured") == honoured
    assert options_in_docs("ignored") == HARMLESS
    assert options_in_docs("refused") == set(UNSUPPORTED)
    assert not HARMLESS & set(UNSUPPORTED)
