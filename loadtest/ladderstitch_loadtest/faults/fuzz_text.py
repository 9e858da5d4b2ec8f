"""Fuzz cases for a language model: malformed, late and cancelled requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import grpc

from ladderstitch.v1 import generation_pb2 as pb
from ladderstitch.v1 import generation_pb2_grpc, inference_pb2
from ladderstitch_loadtest.faults.fuzz_runner import (
    ANSWERED,
    INFEASIBLE,
    INVALID_ARGUMENT,
    NO_MODEL,
    NO_QUALITY,
    NO_VARIANT,
    FuzzCase,
)

PROMPT = "The history of the bicycle begins"
LATE = frozenset(
    {
        INFEASIBLE,
        (grpc.StatusCode.DEADLINE_EXCEEDED, ""),  # the client's own clock ended the call
        (grpc.StatusCode.DEADLINE_EXCEEDED, "EXPIRED_IN_QUEUE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "EXPIRED_IN_COMPUTE"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    }
)
"""Statuses with which a request whose deadline is milliseconds away may end."""


class TextCases:
    """The `FuzzCases` of one language model, drawn with a seed."""

    def __init__(
        self, model: inference_pb2.GetModelResponse, channel: grpc.aio.Channel, seed: int
    ) -> None:
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self._vocabulary = model.language.vocabulary_size
        self._context = model.language.max_model_len
        self._variants = len(model.language.variants)
        self._rng = random.Random(seed)
        self._makers: list[Callable[[], FuzzCase]] = [
            self._no_prompt,
            self._empty_prompt,
            self._wrong_tokens,
            self._long_prompt,
            self._long_text,
            self._max_tokens,
            self._temperature,
            self._top_k,
            self._top_p,
            self._stop,
            self._logprobs,
            self._budget,
            self._token_budget,
            self._metadata,
            self._quality,
            self._variant,
            self._name,
            self._long_id,
            self._tight_hard_budget,
            self._deadline,
            self._cancelled,
            self._full_context,
        ]

    def case(self, index: int) -> FuzzCase:
        """Return case number `index`; the 22 kinds take turns."""
        return self._makers[index % len(self._makers)]()

    async def send(self, case: FuzzCase) -> None:
        """Send a case and read its stream, or cancel it after `case.cancel_after` chunks.

        Raises `grpc.aio.AioRpcError` if the server answers with an error.
        """
        call = self._stub.Generate(case.request, metadata=case.metadata, timeout=case.timeout_s)
        chunks = 0
        async for _ in call:
            chunks += 1
            if chunks == case.cancel_after:
                call.cancel()
                return

    async def send_good(self) -> None:
        """Send a well-formed request; raise `AssertionError` if its stream is incomplete."""
        request = self._request()
        chunks = [chunk async for chunk in self._stub.Generate(request, timeout=60)]
        if not chunks or not chunks[-1].finish_reason:
            raise AssertionError("good request: expected a finish reason, got an incomplete stream")

    def _request(self, **fields: Any) -> pb.GenerateRequest:
        defaults: dict[str, Any] = {"text": PROMPT, "max_tokens": 3}
        return pb.GenerateRequest(**defaults | fields)

    def _bad(self, kind: str, **fields: Any) -> FuzzCase:
        return FuzzCase(kind, self._request(**fields), INVALID_ARGUMENT)

    def _no_prompt(self) -> FuzzCase:
        return FuzzCase("no prompt", pb.GenerateRequest(max_tokens=3), INVALID_ARGUMENT)

    def _empty_prompt(self) -> FuzzCase:
        empty = self._rng.choice([pb.GenerateRequest(text=""), pb.GenerateRequest()])
        if not empty.HasField("text"):
            empty.tokens.SetInParent()
        return FuzzCase("empty prompt", empty, INVALID_ARGUMENT)

    def _wrong_tokens(self) -> FuzzCase:
        wrong = self._rng.choice([-1, self._vocabulary, 2**31 - 1, -(2**31)])
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[1, wrong, 2]), max_tokens=3)
        return FuzzCase("tokens out of the vocabulary", request, INVALID_ARGUMENT)

    def _long_prompt(self) -> FuzzCase:
        """Return a prompt that leaves no room in the context for a token of the answer."""
        length = self._rng.choice([self._context, self._context + 1, 10 * self._context])
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * length))
        return FuzzCase("prompt over the context", request, INVALID_ARGUMENT)

    def _long_text(self) -> FuzzCase:
        return self._bad("text over the context", text="word " * self._rng.choice([5000, 200_000]))

    def _max_tokens(self) -> FuzzCase:
        wrong = self._rng.choice([0, -1, self._context, 2**31 - 1, -(2**31)])
        return self._bad("max_tokens", max_tokens=wrong)

    def _temperature(self) -> FuzzCase:
        return self._bad("temperature", temperature=self._rng.choice([-1.0, 101.0, float("nan")]))

    def _top_k(self) -> FuzzCase:
        return self._bad("top_k", top_k=self._rng.choice([-1, -(2**31)]))

    def _top_p(self) -> FuzzCase:
        return self._bad("top_p", top_p=self._rng.choice([0.0, -0.5, 1.01, float("nan")]))

    def _stop(self) -> FuzzCase:
        return self._bad("stop", stop=self._rng.choice([["x"] * 17, [""], ["ok", ""]]))

    def _logprobs(self) -> FuzzCase:
        return self._bad("logprobs", logprobs=self._rng.choice([-1, 21, 2**31 - 1]))

    def _budget(self) -> FuzzCase:
        value = self._rng.choice([0, -1, -(2**63), 2**63 - 1, 3_600_000_001])
        return self._bad("budget", latency_budget_us=value, hard_deadline=self._rng.random() < 0.5)

    def _token_budget(self) -> FuzzCase:
        name = self._rng.choice(["first_token_budget_us", "token_budget_us"])
        return self._bad("token budget", **{name: self._rng.choice([0, -5, 2**63 - 1])})

    def _metadata(self) -> FuzzCase:
        key = self._rng.choice(
            ["x-latency-budget-ms", "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"]
        )
        text = self._rng.choice(["nan", "inf", "-5", "0", "1e300", "soon", ""])
        return FuzzCase("metadata", self._request(), INVALID_ARGUMENT, ((key, text),))

    def _quality(self) -> FuzzCase:
        value = self._rng.choice([-0.1, 1.1, float("nan"), 1.0])
        expected = NO_QUALITY if value == 1.0 else INVALID_ARGUMENT
        return FuzzCase("quality", self._request(min_quality=value), expected)

    def _variant(self) -> FuzzCase:
        value = self._rng.choice([-1, self._variants, 2**31 - 1])
        return FuzzCase("unknown variant", self._request(variant_id=value), NO_VARIANT)

    def _name(self) -> FuzzCase:
        wrong = self._rng.choice([{"model_name": "x" * 5000}, {"model_version": "latest"}])
        return FuzzCase("unknown model", self._request(**wrong), NO_MODEL)

    def _long_id(self) -> FuzzCase:
        return self._bad("long id", request_id="i" * self._rng.choice([129, 100_000]))

    def _tight_hard_budget(self) -> FuzzCase:
        tight = self._request(latency_budget_us=self._rng.randint(1, 20), hard_deadline=True)
        return FuzzCase("hard budget of microseconds", tight, INFEASIBLE)

    def _deadline(self) -> FuzzCase:
        """Return a deadline that most models miss; a tiny one may meet it."""
        timeout_s = self._rng.uniform(0.001, 0.004)
        return FuzzCase(
            "deadline of 1 to 4 ms",
            self._request(max_tokens=40),
            LATE | {ANSWERED},
            timeout_s=timeout_s,
        )

    def _cancelled(self) -> FuzzCase:
        return FuzzCase(
            "cancelled by its caller",
            self._request(max_tokens=20),
            ANSWERED,
            cancel_after=self._rng.randint(1, 6),
        )

    def _full_context(self) -> FuzzCase:
        """Return a valid prompt that leaves room for exactly one token of the answer."""
        request = pb.GenerateRequest(
            tokens=pb.TokenIds(ids=[1] * (self._context - 1)), max_tokens=1
        )
        return FuzzCase("prompt that just fits", request, ANSWERED)
