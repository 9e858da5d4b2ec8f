"""Bearer tokens: a file of names, scopes and limits, reread when it changes.

tokens:
  - name: shop                    # for logs; may appear twice while a token is rotated
    token: 3f0c...                # or sha256: its digest in hex, so that the file holds no secret
    scopes: [inference]           # inference, admin
    concurrent_requests: 32       # optional: calls in flight
    requests_per_s: 200           # optional: steady rate; a second's worth may come at once
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ladderstitch.errors import ConfigError, RateLimited

log = logging.getLogger(__name__)

Scope = Literal["inference", "admin"]
MIN_CHARACTERS = 16
CHECK_S = 1.0
"""How often the file is looked at."""


class Token(BaseModel):
    """One caller: what it may do and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=64)
    token: str | None = Field(None, min_length=MIN_CHARACTERS, repr=False)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = frozenset({"inference"})
    concurrent_requests: int | None = Field(None, ge=1)
    requests_per_s: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _secret_or_digest(self) -> Token:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("expected either token or sha256")
        return self

    @property
    def digest(self) -> str:
        return self.sha256 or digest_of(self.token or "")


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    tokens: list[Token] = Field(min_length=1)


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def tenant_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Who shares with whom: callers of one bearer token; without tokens, all of them."""
    for key, value in metadata:
        if key == "authorization":
            return digest_of(value if isinstance(value, str) else value.decode(errors="replace"))
    return ""


def load_tokens(path: Path) -> dict[str, Token]:
    """Tokens by digest; raises `ConfigError` that names the field but shows no secret."""
    try:
        tokens = _File.model_validate(yaml.safe_load(path.read_text())).tokens
    except (OSError, ValidationError) as error:
        raise ConfigError(f"token_file: {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # the parser's message would quote the line
        raise ConfigError(f"token_file: {path}: not YAML") from error
    by_digest = {token.digest: token for token in tokens}
    if len(by_digest) < len(tokens):
        raise ConfigError(f"token_file: {path}: the same token twice")
    return by_digest


class TokenFile:
    """Looks tokens up; a new version of the file that is wrong leaves the old one in force."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        ours: Iterable[Token] = (),
    ) -> None:
        """`ours` are valid, too, and in no file. Raises `ConfigError` if it cannot be used."""
        self.path = path
        self._ours = {token.digest: token for token in ours}
        self._clock = clock
        self._stamp = _stamp(path)
        self._tokens = load_tokens(path)
        self._checked = clock()

    def find(self, secret: str) -> Token | None:
        """By digest: the time it takes says nothing about the secret."""
        if self._clock() - self._checked >= CHECK_S:
            self._checked = self._clock()
            self._reread()
        digest = digest_of(secret)
        return self._tokens.get(digest) or self._ours.get(digest)

    def _reread(self) -> None:
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tokens = load_tokens(self.path)
        except ConfigError as error:
            log.warning("the old tokens stay in force: %s", error)
        else:
            log.info("token file %s reread: %d tokens", self.path, len(self._tokens))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_ino


BUSY_RETRY_S = 0.1
"""What a caller with too many calls in flight is told to wait: about the time one takes."""


@dataclass(slots=True)
class Usage:
    """A token's calls in flight, and its bucket: one second's worth of calls at most."""

    in_flight: int = 0
    allowance: float = 0.0
    filled_at: float = 0.0


class Limits:
    """Counts by the token's name, so that a rotated token keeps its predecessor's account."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, Usage] = {}

    @contextmanager
    def admitted(self, token: Token) -> Iterator[None]:
        """Hold a place for the time of a call; raises `RateLimited` if there is none."""
        usage = self._of(token)
        most = token.concurrent_requests
        if most is not None and usage.in_flight >= most:
            raise RateLimited(
                f"token {token.name!r} has {most} requests in flight, its most", BUSY_RETRY_S
            )
        self._take(usage, token)
        usage.in_flight += 1
        try:
            yield
        finally:
            usage.in_flight -= 1

    def in_flight(self, name: str) -> int:
        return self._usage[name].in_flight if name in self._usage else 0

    def _of(self, token: Token) -> Usage:
        if token.name not in self._usage:
            full = max(1.0, token.requests_per_s or 0.0)
            self._usage[token.name] = Usage(allowance=full, filled_at=self._clock())
        return self._usage[token.name]

    def _take(self, usage: Usage, token: Token) -> None:
        rate = token.requests_per_s
        if rate is None:
            return
        now = self._clock()
        grown = usage.allowance + rate * (now - usage.filled_at)
        usage.allowance, usage.filled_at = min(max(1.0, rate), grown), now
        if usage.allowance < 1:
            raise RateLimited(
                f"token {token.name!r} may send {rate:g} requests a second",
                (1 - usage.allowance) / rate,
            )
        usage.allowance -= 1
