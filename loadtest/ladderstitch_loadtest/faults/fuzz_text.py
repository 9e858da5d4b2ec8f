"""Requests to a language model that are wrong, too late, or left by their callers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import grpc

from ladderstitch.v1 import generation_pb2 as pb
from ladderstitch.v1 import generation_pb2_grpc, inference_pb2
from ladderstitch_loadtest.faults.fuzz_runner import (
    ANSWERED,
    BAD_INPUT,
    INFEASIBLE,
    NO_MODEL,
    NO_QUALITY,
    NO_VARIANT,
    Case,
)

PROMPT = "The history of the bicycle begins"
LATE = frozenset(
    {
        INFEASIBLE,
        (grpc.StatusCode.DEADLINE_EXCEEDED, ""),  # the client's own clock was first
        (grpc.StatusCode.DEADLINE_EXCEEDED, "EXPIRED_IN_QUEUE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "EXPIRED_IN_COMPUTE"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    }
)
"""How a deadline of milliseconds may end."""


class TextCases:
    """A `FuzzCases` of requests to one language model, by seed."""

    def __init__(
        self, model: inference_pb2.GetModelResponse, channel: grpc.aio.Channel, seed: int
    ) -> None:
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self.vocabulary = model.language.vocabulary_size
        self.context = model.language.max_model_len
        self.paths = len(model.language.paths)
        self.rng = random.Random(seed)
        self.makers: list[Callable[[], Case]] = [
            self.no_prompt,
            self.empty_prompt,
            self.wrong_tokens,
            self.long_prompt,
            self.long_text,
            self.max_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            self.stop,
            self.logprobs,
            self.budget,
            self.token_budget,
            self.metadata,
            self.quality,
            self.variant,
            self.name,
            self.long_id,
            self.tight_limit,
            self.deadline,
            self.cancelled,
            self.full_context,
        ]

    def case(self, index: int) -> Case:
        return self.makers[index % len(self.makers)]()

    async def send(self, case: Case) -> None:
        call = self._stub.Generate(case.request, metadata=case.metadata, timeout=case.timeout_s)
        pieces = 0
        async for _ in call:
            pieces += 1
            if pieces == case.leave_after:
                call.cancel()
                return

    async def send_good(self) -> None:
        request = self._request()
        pieces = [piece async for piece in self._stub.Generate(request, timeout=60)]
        if not pieces or not pieces[-1].finish_reason:
            raise AssertionError("a good request was not answered")

    def _request(self, **fields: Any) -> pb.GenerateRequest:
        wishes: dict[str, Any] = {"text": PROMPT, "max_tokens": 3}
        return pb.GenerateRequest(**wishes | fields)

    def _bad(self, kind: str, **fields: Any) -> Case:
        return Case(kind, self._request(**fields), BAD_INPUT)

    def no_prompt(self) -> Case:
        return Case("no prompt", pb.GenerateRequest(max_tokens=3), BAD_INPUT)

    def empty_prompt(self) -> Case:
        empty = self.rng.choice([pb.GenerateRequest(text=""), pb.GenerateRequest()])
        if not empty.HasField("text"):
            empty.tokens.SetInParent()
        return Case("empty prompt", empty, BAD_INPUT)

    def wrong_tokens(self) -> Case:
        wrong = self.rng.choice([-1, self.vocabulary, 2**31 - 1, -(2**31)])
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[1, wrong, 2]), max_tokens=3)
        return Case("tokens out of the vocabulary", request, BAD_INPUT)

    def long_prompt(self) -> Case:
        """At the context's length there is no room for a token."""
        length = self.rng.choice([self.context, self.context + 1, 10 * self.context])
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * length))
        return Case("prompt over the context", request, BAD_INPUT)

    def long_text(self) -> Case:
        return self._bad("text over the context", text="word " * self.rng.choice([5000, 200_000]))

    def max_tokens(self) -> Case:
        wrong = self.rng.choice([0, -1, self.context, 2**31 - 1, -(2**31)])
        return self._bad("max_tokens", max_tokens=wrong)

    def temperature(self) -> Case:
        return self._bad("temperature", temperature=self.rng.choice([-1.0, 101.0, float("nan")]))

    def top_k(self) -> Case:
        return self._bad("top_k", top_k=self.rng.choice([-1, -(2**31)]))

    def top_p(self) -> Case:
        return self._bad("top_p", top_p=self.rng.choice([0.0, -0.5, 1.01, float("nan")]))

    def stop(self) -> Case:
        return self._bad("stop", stop=self.rng.choice([["x"] * 17, [""], ["ok", ""]]))

    def logprobs(self) -> Case:
        return self._bad("logprobs", logprobs=self.rng.choice([-1, 21, 2**31 - 1]))

    def budget(self) -> Case:
        value = self.rng.choice([0, -1, -(2**63), 2**63 - 1, 3_600_000_001])
        return self._bad("budget", latency_budget_us=value, hard_deadline=self.rng.random() < 0.5)

    def token_budget(self) -> Case:
        name = self.rng.choice(["first_token_budget_us", "token_budget_us"])
        return self._bad("token budget", **{name: self.rng.choice([0, -5, 2**63 - 1])})

    def metadata(self) -> Case:
        key = self.rng.choice(["x-latency-budget-ms", "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"])
        text = self.rng.choice(["nan", "inf", "-5", "0", "1e300", "soon", ""])
        return Case("metadata", self._request(), BAD_INPUT, ((key, text),))

    def quality(self) -> Case:
        value = self.rng.choice([-0.1, 1.1, float("nan"), 1.0])
        expected = NO_QUALITY if value == 1.0 else BAD_INPUT
        return Case("quality", self._request(min_quality=value), expected)

    def variant(self) -> Case:
        value = self.rng.choice([-1, self.paths, 2**31 - 1])
        return Case("unknown path", self._request(variant_id=value), NO_VARIANT)

    def name(self) -> Case:
        wrong = self.rng.choice([{"model_name": "x" * 5000}, {"model_version": "latest"}])
        return Case("unknown model", self._request(**wrong), NO_MODEL)

    def long_id(self) -> Case:
        return self._bad("long id", request_id="i" * self.rng.choice([129, 100_000]))

    def tight_limit(self) -> Case:
        tight = self._request(latency_budget_us=self.rng.randint(1, 20), hard_deadline=True)
        return Case("hard budget of microseconds", tight, INFEASIBLE)

    def deadline(self) -> Case:
        """Too little for most models; a tiny one may make it."""
        timeout_s = self.rng.uniform(0.001, 0.004)
        return Case(
            "deadline of 1 to 4 ms",
            self._request(max_tokens=40),
            LATE | {ANSWERED},
            timeout_s=timeout_s,
        )

    def cancelled(self) -> Case:
        return Case(
            "left by its caller",
            self._request(max_tokens=20),
            ANSWERED,
            leave_after=self.rng.randint(1, 6),
        )

    def full_context(self) -> Case:
        """A prompt that leaves room for one token is fine."""
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * (self.context - 1)), max_tokens=1)
        return Case("prompt that just fits", request, ANSWERED)
