"""The fields that completions and chats share, and their translation to sampling options."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

from ladderstitch.api.native.generation import MAX_STOP_TOKENS, MAX_STOPS
from ladderstitch.api.openai.answer_so_far import AnswerSoFar
from ladderstitch.api.openai.options import UNSUPPORTED
from ladderstitch.api.openai.schemas import close_objects
from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.sampling import GREEDY, Sampling
from ladderstitch.text.manifest import SamplingDefaults

RANDOM_SEED, ALL_TOKENS = -1, -1
"""The seed that stands for none, and the `top_k` that keeps all tokens."""
MAX_CHOICES = 128
"""Maximum number of answers to one request, of all its prompts together."""


def _check_unicode(text: str) -> str:
    """Return the text; raises `ValueError` for a lone surrogate.

    JSON's escapes can spell one, but no tokenizer accepts it.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("expected Unicode text, got a lone surrogate")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]


class OpenFields(BaseModel):
    """A part of a request that may have more fields than are supported."""

    model_config = ConfigDict(extra="allow")

    def check_unsupported(self, path: str = "") -> None:
        """Raise `InvalidArgument` if an unsupported option would change the answer.

        `path` precedes the names of the fields.
        """
        for field, value in (self.model_extra or {}).items():
            neutral = UNSUPPORTED.get(path + field)
            if neutral is None or value is None or value in neutral:
                continue
            expected = " or ".join([*map(repr, neutral), "no value"])
            raise InvalidArgument(path + field, f"expected {expected}, got {repr(value)[:60]}")


class StreamOptions(OpenFields):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class EmbeddingRequest(OpenFields):
    """The body of `/v1/embeddings`, which no model answers."""

    model: Text


class JsonSchema(BaseModel):
    """The schema of answers in JSON; a missing one permits every object."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    name: Text = ""
    schema_: dict[str, Any] | Flag | None = Field(None, alias="schema")
    strict: Flag | None = None


class ResponseFormat(BaseModel):
    """The format of answers: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_text(self) -> str | None:
        """Return the JSON schema as text; None for free text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return '{"type": "object"}'
        if self.json_schema is None:
            raise InvalidArgument("response_format.json_schema", "expected a schema, got none")
        schema = self.json_schema.schema_
        if schema is None:
            return '{"type": "object"}'
        return json.dumps(close_objects("response_format", schema))


class SamplingFields(OpenFields):
    """The fields of completion and chat requests.

    `min_quality`, `variant_id` and `answer_so_far` are our own; `top_k`, `min_p`,
    `repetition_penalty`, `min_tokens`, `stop_token_ids` and `ignore_eos` are extensions of vLLM.
    """

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: Number | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    n: Integer | None = Field(None, ge=1, le=MAX_CHOICES)
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    min_tokens: Integer | None = None
    stop_token_ids: list[Integer] | None = Field(None, max_length=MAX_STOP_TOKENS)
    ignore_eos: Flag | None = None
    response_format: ResponseFormat | None = None
    min_quality: float | None = Field(None, ge=0, le=1)
    variant_id: int | None = None
    answer_so_far: AnswerSoFar | None = None

    def check_unsupported(self, path: str = "") -> None:
        """Raise `InvalidArgument` if an unsupported option would change the answer."""
        super().check_unsupported(path)
        if self.stream_options is not None:
            self.stream_options.check_unsupported("stream_options.")

    def stop_texts(self) -> tuple[str, ...]:
        """Return the stop texts; raises `InvalidArgument` for more than 16."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise InvalidArgument("stop", f"expected at most {MAX_STOPS} texts, got {len(stops)}")
        return stops

    def sampling(self, defaults: SamplingDefaults, number: int = 0) -> Sampling:
        """Return the sampling parameters of the answer with this number to a prompt.

        Values that other servers accept mean what they do there. Options that are not stated have
        the model's `defaults`. `top_p` 0 keeps only the likeliest token, `top_k` -1 keeps all and
        `seed` -1 is random. Raises `InvalidArgument` for another negative seed.
        """
        if self.seed is not None and self.seed < RANDOM_SEED:
            raise InvalidArgument("seed", f"expected -1 (random) or more, got {self.seed}")
        greedy = self.top_p == 0
        sampling = Sampling(
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_k={None: defaults.top_k, ALL_TOKENS: 0}.get(self.top_k, self.top_k or 0),
            top_p=defaults.top_p if self.top_p is None else self.top_p or 1.0,
            seed=None if self.seed in (None, RANDOM_SEED) else self.seed + number,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=self._biases(),
        )
        if not greedy:
            return sampling
        sampling.check()  # other fields are checked, although greedy decoding needs none
        if not sampling.changes_logits:
            return GREEDY
        return Sampling(
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=sampling.logit_bias,
        )

    def _biases(self) -> tuple[tuple[int, float], ...]:
        biases = self.logit_bias or {}
        if wrong := [key for key in biases if not (key.isascii() and key.isdigit())]:
            raise InvalidArgument("logit_bias", f"expected token ids as keys, got {wrong[0]!r:.40}")
        return tuple((int(key[:20]), bias) for key, bias in biases.items())
