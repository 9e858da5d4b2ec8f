"""Bearer tokens: a file of names, scopes and limits, read again when it changes.

tokens:
  - name: shop                    # for logs; may appear twice while a token is rotated
    token: 3f0c...                # or sha256: its digest in hex, so that the file holds no secret
    scopes: [inference]           # inference, admin
    concurrent_requests: 32       # optional: requests in flight, and streams of requests open
    requests_per_s: 200           # optional: steady rate; bursts hold at most one second's requests
    watchers: 64                  # optional: watchers of the load at once

Each request of a stream counts as one.
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
"""Minimum length of a token."""
MAX_CHARACTERS = 4096
"""Maximum length of a token: gRPC rejects calls at random whose headers exceed 8 KiB."""
TOKEN_CHARACTERS = r"^[\x21-\x7e]*$"
"""The characters that headers carry unchanged: printable ASCII without spaces."""
READABLE_BY_OTHERS = 0o044
CHECK_INTERVAL_S = 1.0
"""Seconds between checks whether the file has changed."""
BUSY_RETRY_S = 0.1
"""Seconds to wait that a caller with too many calls in flight is sent: about one call's time."""


class Token(BaseModel):
    """One caller's token: its secret or the digest of it, its scopes and its limits."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=64)
    token: str | None = Field(
        None,
        min_length=MIN_CHARACTERS,
        max_length=MAX_CHARACTERS,
        pattern=TOKEN_CHARACTERS,
        repr=False,
    )
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = frozenset({"inference"})
    concurrent_requests: int | None = Field(None, ge=1)
    requests_per_s: float | None = Field(None, gt=0)
    watchers: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _check_secret_or_digest(self) -> Token:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("expected either token or sha256")
        return self

    @property
    def digest(self) -> str:
        """The SHA-256 of the secret, in hex."""
        return self.sha256 or digest_of(self.token or "")


class _TokenFileFields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    tokens: list[Token] = Field(min_length=1)


def digest_of(secret: str) -> str:
    """Return the SHA-256 of a secret, in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def load_tokens(path: Path) -> dict[str, Token]:
    """Return tokens by digest; raises `ConfigError` that names the field but shows no secret."""
    try:
        tokens = _TokenFileFields.model_validate(yaml.safe_load(path.read_text())).tokens
    except (OSError, ValidationError) as error:
        raise ConfigError(f"token_file: {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # the parser's message would quote the line
        raise ConfigError(f"token_file: {path}: expected YAML") from error
    by_digest = {token.digest: token for token in tokens}
    if len(by_digest) < len(tokens):
        raise ConfigError(f"token_file: {path}: expected different tokens, got the same one twice")
    return by_digest


class TokenFile:
    """A file of tokens, read again when it changes; an invalid new version is ignored."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        extra: Iterable[Token] = (),
    ) -> None:
        """Read the file; tokens in `extra` are valid, too.

        Raises `ConfigError` if the file cannot be used.
        """
        self.path = path
        self._extra = {token.digest: token for token in extra}
        self._clock = clock
        self._stamp = _file_stamp(path)
        self._tokens = load_tokens(path)
        self._checked_at = clock()
        _warn_if_readable(path)

    def find(self, secret: str) -> Token | None:
        """Return the token with this secret, or None.

        Tokens are found by digest, so that the time a look-up takes does not depend on the secret.
        """
        if self._clock() - self._checked_at >= CHECK_INTERVAL_S:
            self._checked_at = self._clock()
            self._read_change()
        digest = digest_of(secret)
        return self._tokens.get(digest) or self._extra.get(digest)

    def _read_change(self) -> None:
        stamp = _file_stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tokens = load_tokens(self.path)
        except ConfigError as error:
            log.warning("token file rejected, keeping the old tokens: %s", error)
        else:
            log.info("token file %s read again: %d tokens", self.path, len(self._tokens))
            _warn_if_readable(self.path)


def _file_stamp(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_ino


def _warn_if_readable(path: Path) -> None:
    """Log a warning if other users of the machine can read the file."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:  # the next check of the file reports it
        return
    if mode & READABLE_BY_OTHERS:
        log.warning(
            "token_file: %s: expected mode 0600, got %04o: other users can read it", path, mode
        )


@dataclass(slots=True)
class TokenUsage:
    """A token's requests in flight, open streams, and its bucket of one second's requests."""

    in_flight: int = 0
    streams: int = 0
    watchers: int = 0
    allowance: float = 0.0
    filled_at: float = 0.0


class RateLimiter:
    """Limits of requests per token; counts by the token's name, so that rotation resets nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, TokenUsage] = {}

    @contextmanager
    def acquire(self, token: Token) -> Iterator[None]:
        """Count a request of the token as in flight; raises `RateLimited` above its limits."""
        usage = self._find_usage(token)
        limit = token.concurrent_requests
        if limit is not None and usage.in_flight >= limit:
            raise RateLimited(
                f"concurrent_requests: expected at most {limit} requests of token {token.name!r} "
                f"in flight, got {limit + 1}",
                BUSY_RETRY_S,
            )
        self._spend_allowance(usage, token)
        usage.in_flight += 1
        try:
            yield
        finally:
            usage.in_flight -= 1

    @contextmanager
    def open_stream(self, token: Token) -> Iterator[None]:
        """Count a stream of requests as open; raises `RateLimited` above `concurrent_requests`."""
        usage, limit = self._find_usage(token), token.concurrent_requests
        if limit is not None and usage.streams >= limit:
            raise RateLimited(
                f"concurrent_requests: expected at most {limit} open streams of token "
                f"{token.name!r}, got {limit + 1}",
                BUSY_RETRY_S,
            )
        usage.streams += 1
        try:
            yield
        finally:
            usage.streams -= 1

    @contextmanager
    def open_watch(self, token: Token) -> Iterator[None]:
        """Count a watcher as open; raises `RateLimited` above `watchers`."""
        usage = self._find_usage(token)
        if usage.watchers >= token.watchers:
            raise RateLimited(
                f"watchers: expected at most {token.watchers} of token {token.name!r}, got "
                f"{token.watchers + 1}",
                BUSY_RETRY_S,
            )
        usage.watchers += 1
        try:
            yield
        finally:
            usage.watchers -= 1

    def in_flight(self, name: str) -> int:
        """Return the number of calls in flight of the token called `name`."""
        return self._usage[name].in_flight if name in self._usage else 0

    def watchers(self, name: str) -> int:
        """Return the number of open watchers of the token called `name`."""
        return self._usage[name].watchers if name in self._usage else 0

    def _find_usage(self, token: Token) -> TokenUsage:
        if token.name not in self._usage:
            full = max(1.0, token.requests_per_s or 0.0)
            self._usage[token.name] = TokenUsage(allowance=full, filled_at=self._clock())
        return self._usage[token.name]

    def _spend_allowance(self, usage: TokenUsage, token: Token) -> None:
        rate = token.requests_per_s
        if rate is None:
            return
        now = self._clock()
        grown = usage.allowance + rate * (now - usage.filled_at)
        usage.allowance, usage.filled_at = min(max(1.0, rate), grown), now
        if usage.allowance < 1:
            raise RateLimited(
                f"requests_per_s: expected at most {rate:g} requests per second of token "
                f"{token.name!r}, got more",
                (1 - usage.allowance) / rate,
            )
        usage.allowance -= 1
