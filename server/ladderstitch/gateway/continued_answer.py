"""A streamed answer that another replica can go on with when the one that gives it dies."""

from __future__ import annotations

import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from ladderstitch.v1.generation_pb2 import GenerateRequest, GenerateResponse

GENERATE = "/ladderstitch.v1.GenerationService/Generate"
"""The method whose answers can be continued."""


class ContinuedAnswer:
    """The request of one answer, and the tokens that its caller has received."""

    def __init__(
        self, request: bytes, arrival: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`arrival` is the instant on `clock` at which the request arrived."""
        self._original, self._arrival, self._clock = request, arrival, clock
        self._tokens: list[int] = []
        self._num_known = self._num_at_start = 0
        self._first_token_us = 0
        self.finished = False
        """Whether the caller has received the last response."""
        self.started = False
        """Whether the caller has received a response."""
        self._is_known = True

    @property
    def can_continue(self) -> bool:
        """Whether the caller has tokens, and only tokens that are known here."""
        return bool(self._tokens) and self._is_known

    @property
    def request(self) -> bytes:
        """The request for the rest of the answer: the original one before the first token.

        A request that is itself the rest of an answer, of a gateway before this one, keeps the
        tokens that it has.
        """
        if not self.can_continue:
            return self._original
        request = GenerateRequest.FromString(self._original)
        if not request.answer_so_far.HasField("first_token_us"):
            request.answer_so_far.first_token_us = max(1, self._first_token_us)
        request.answer_so_far.token_ids.extend(self._tokens)
        return request.SerializeToString()

    def begin(self) -> None:
        """Begin to read the responses of a replica."""
        self._num_at_start = len(self._tokens)

    @property
    def has_grown(self) -> bool:
        """Whether the last replica has added a token."""
        return len(self._tokens) > self._num_at_start

    def fits(self, message: bytes) -> bool:
        """Return whether a response is the next one; older replicas begin again from the start."""
        if not self.can_continue:
            return True
        try:
            index = GenerateResponse.FromString(message).index
        except DecodeError:
            return False
        return index == self._num_known

    def record(self, message: bytes) -> None:
        """Record a response that the caller has received."""
        self.started = True
        try:
            response = GenerateResponse.FromString(message)
        except DecodeError:  # of a protocol that this gateway does not know
            self._is_known = False
            return
        if not self._tokens:
            self._first_token_us = round(1e6 * (self._clock() - self._arrival))
        self._tokens.append(response.token_id)
        self._num_known = response.index + 1
        self.finished = bool(response.finish_reason)
