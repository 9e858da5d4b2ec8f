"""The options of Triton's clients: which are honoured, ignored because harmless, or refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from ladderstitch.errors import InvalidArgument

Place = Literal["request", "input", "output", "load", "unload"]
"""The kind of message whose `parameters` hold an option."""
Kind = Literal["images", "text"]
"""The kind of a model."""
KIND_NAMES: dict[Kind | None, str] = {"images": "image models", "text": "language models"}

MIN_SIMILARITY = 0.8
"""Similarity of names, 0 to 1, above which one is taken for the other one misspelt."""


class Treatment(StrEnum):
    """What the server does with an option."""

    HONOURED = "honoured"
    HARMLESS = "ignored because harmless"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its name, where it is sent, and how it is treated, with the reason.

    A name that ends in `*` stands for all that begin so. `kind` is the only kind of models that
    honours the option; None if all do.
    """

    place: Place
    name: str
    treatment: Treatment
    note: str
    kind: Kind | None = None


def _honoured() -> Iterator[Option]:
    for name, note in (
        ("latency_budget_us", "soft budget in microseconds; hard along with `hard_deadline`"),
        ("hard_deadline", "makes `latency_budget_us` a hard deadline"),
        ("timeout", "hard deadline in microseconds"),
        ("variant_id", "the variant to run"),
        ("min_quality", "lowest quality that an answer may have, 0 to 1"),
    ):
        yield Option("request", name, Treatment.HONOURED, note)
    yield Option("request", "priority", Treatment.HONOURED, "1 (highest) to 255", "images")
    note = "confidence from which a cheap variant suffices, 0 to 1"
    yield Option("request", "min_confidence", Treatment.HONOURED, note, "images")
    for name, note in (
        ("max_tokens", "tokens to generate"),
        ("temperature", "0 is greedy"),
        ("top_k", "0 is off"),
        ("top_p", "1 is off"),
        ("seed", "seed of the sampling"),
    ):
        yield Option("request", name, Treatment.HONOURED, note, "text")
    note = "number of classes `class_count` of `logits` and `probabilities`: `value:index:label`"
    yield Option("output", "classification", Treatment.HONOURED, note, "images")


def _harmless() -> Iterator[Option]:
    for place, name, note in (
        ("request", "binary_data_output", "answers over gRPC are always binary"),
        (
            "request",
            "triton_enable_empty_final_response",
            "the last response of every answer has `triton_final_response`",
        ),
        ("request", "sequence_id", "models keep no state between requests"),
        ("request", "sequence_start", "models keep no state between requests"),
        ("request", "sequence_end", "models keep no state between requests"),
        ("output", "binary_data", "answers over gRPC are always binary"),
        ("input", "binary_data_size", "the size of raw contents is known"),
        ("unload", "unload_dependents", "no model depends on another one"),
    ):
        yield Option(place, name, Treatment.HARMLESS, note)  # type: ignore[arg-type] # literals


SAMPLING = "would change the answer, and is not supported"
REFUSED_TEXT_OPTIONS = (
    "bad_words",
    "beam_search_diversity_rate",
    "beam_width",
    "best_of",
    "early_stopping",
    "end_id",
    "exclude_input_in_output",
    "frequency_penalty",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "ignore_eos",
    "len_penalty",
    "length_penalty",
    "logit_bias",
    "logprobs",
    "min_length",
    "min_p",
    "min_tokens",
    "n",
    "num_return_sequences",
    "presence_penalty",
    "prompt_logprobs",
    "repetition_penalty",
    "return_context_logits",
    "return_generation_logits",
    "return_log_probs",
    "runtime_top_k",
    "runtime_top_p",
    "sampling_parameters",
    "stop",
    "stop_token_ids",
    "stop_words",
    "temperature_decay",
    "top_p_decay",
    "use_beam_search",
)
"""Sampling options of Triton's language-model backends."""


def _refused() -> Iterator[Option]:
    for place in ("input", "output"):
        for name in ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"):
            note = "tensors are sent in the message"
            yield Option(place, name, Treatment.REFUSED, note)
    note = "reserved for Triton, and not supported"
    yield Option("request", "triton_*", Treatment.REFUSED, note)
    for name in REFUSED_TEXT_OPTIONS:
        yield Option("request", name, Treatment.REFUSED, SAMPLING, "text")
    yield Option("load", "config", Treatment.REFUSED, "a bundle holds the model's configuration")
    yield Option("load", "file:*", Treatment.REFUSED, "models are loaded from fetched bundles")


OPTIONS = (*_honoured(), *_harmless(), *_refused())
"""All options, in the order of the table in docs/triton.md."""


def check_parameters(place: Place, names: Iterable[str], kind: Kind | None = None) -> None:
    """Raise `InvalidArgument`, which names the option, if one is neither honoured nor harmless.

    Unknown parameters of a request are the caller's own and pass unread, as with Triton, unless
    they resemble an option of this server. Unknown ones anywhere else are rejected.
    """
    for name in sorted(names):  # a map of protobuf has no order, but an error names one field
        option = _find(place, name)
        if option is None:
            _check_unknown(place, name, kind)
        elif option.treatment == Treatment.REFUSED and option.kind in (None, kind):
            raise InvalidArgument(_field(place, name), f"expected none: {option.note}")
        elif option.treatment == Treatment.HONOURED and option.kind not in (None, kind):
            owners = KIND_NAMES[option.kind]
            raise InvalidArgument(_field(place, name), f"expected none: only {owners} take it")


def _find(place: Place, name: str) -> Option | None:
    for option in OPTIONS:
        if option.place == place and _matches(option, name):
            return option
    return None


def _matches(option: Option, name: str) -> bool:
    if option.name.endswith("*"):
        return name.startswith(option.name[:-1])
    return name == option.name


def _check_unknown(place: Place, name: str, kind: Kind | None) -> None:
    honoured = [o for o in OPTIONS if o.place == place and o.treatment == Treatment.HONOURED]
    if place != "request":
        usable = ", ".join(o.name for o in honoured if o.kind in (None, kind)) or "none"
        raise InvalidArgument(_field(place, name), f"expected {usable}, got {name[:80]!r}")
    meant = resembled_option(name, [option.name for option in honoured])
    if meant is not None:
        raise InvalidArgument(
            "parameters", f"expected known parameters, got {name[:80]!r}; did you mean {meant!r}?"
        )


def resembled_option(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a name probably stands for; None if it resembles none.

    Names resemble each other if they are almost equal without case and separators, or if one
    has all words, at least two, of the other one.
    """
    by_letters = {_letters(option): option for option in known}
    close = difflib.get_close_matches(_letters(name[:80]), by_letters, 1, MIN_SIMILARITY)
    if close:
        return by_letters[close[0]]
    words = _words(name[:80])
    for option in by_letters.values():
        shared = words & _words(option)
        if len(shared) > 1 and shared in (words, _words(option)):
            return option
    return None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))


def _field(place: Place, name: str) -> str:
    """Return the path of a parameter for an error message."""
    prefix = {"input": "inputs.parameters", "output": "outputs.parameters"}.get(place, "parameters")
    return f"{prefix}.{name[:80]}"
