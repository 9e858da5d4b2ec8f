"""The token file: its contents, its changes and its errors; and the limits of tokens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ladderstitch.errors import ConfigError, RateLimited
from ladderstitch.security.tokens import (
    CHECK_INTERVAL_S,
    RateLimiter,
    Token,
    TokenFile,
    digest_of,
    load_tokens,
)

SECRET = "a-secret-of-some-length"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def write(path: Path, text: str) -> Path:
    """Replace the file by a new one, as secrets are rotated."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)
    return path


def test_token_is_found_by_secret_and_by_digest(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    other = "another-secret-of-length"
    write(
        path,
        f"tokens: [{{name: a, token: {SECRET}}}, "
        f"{{name: b, sha256: {digest_of(other)}, scopes: [admin]}}]",
    )
    tokens = TokenFile(path)
    found = tokens.find(SECRET)
    assert found is not None
    assert (found.name, found.scopes) == ("a", {"inference"})
    second = tokens.find(other)
    assert second is not None
    assert second.scopes == {"admin"}
    assert tokens.find("unknown") is None
    assert tokens.find("") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tokens: []", "at least 1 item"),
        ("tokens: [{name: a}]", "either token or sha256"),
        (f"tokens: [{{name: a, token: {SECRET}, sha256: {'ab' * 32}}}]", "either token or sha256"),
        (f"tokens: [{{name: a, token: {SECRET}, scopes: [root]}}]", "scopes"),
        (f"tokens: [{{name: a, token: {SECRET}, requests_per_s: 0}}]", "requests_per_s"),
        (f"tokens: [{{name: a, token: {SECRET}, colour: red}}]", "colour"),
        ("tokens: [{name: a, token: short-secret}]", "at least 16 characters"),
        (f"tokens: [{{name: a, token: {SECRET}}}, {{name: b, token: {SECRET}}}]", "twice"),
        (f"{{{SECRET}", "expected YAML"),
        (f"- {SECRET}", "token_file"),
    ],
)
def test_invalid_token_file_error_shows_no_secret(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path / "tokens.yaml", text)
    with pytest.raises(ConfigError, match=reason) as failed:
        load_tokens(path)
    assert SECRET not in str(failed.value)
    assert "short-secret" not in str(failed.value)


def test_changed_token_file_applies_unless_it_is_invalid(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "tokens.yaml", f"tokens: [{{name: a, token: {SECRET}}}]")
    tokens = TokenFile(path, clock=clock)
    write(path, "tokens: [{name: b, token: the-next-secret-of-all}]")
    assert tokens.find(SECRET) is not None
    clock.now += CHECK_INTERVAL_S
    assert tokens.find(SECRET) is None
    assert tokens.find("the-next-secret-of-all") is not None
    write(path, "tokens: nonsense")
    clock.now += CHECK_INTERVAL_S
    assert tokens.find("the-next-secret-of-all") is not None
    assert "keeping the old tokens" in caplog.text
    path.unlink()
    clock.now += CHECK_INTERVAL_S
    assert tokens.find("the-next-secret-of-all") is not None


def test_requests_per_second_allow_bursts_of_one_second(clock: Clock) -> None:
    token = Token(name="a", token=SECRET, requests_per_s=4)
    limiter = RateLimiter(clock)

    def call() -> None:
        with limiter.acquire(token):
            pass

    for _ in range(4):
        call()
    with pytest.raises(RateLimited) as failed:
        call()
    assert failed.value.retry_after_s == pytest.approx(0.25)
    clock.now += 0.25
    call()
    with pytest.raises(RateLimited):
        call()
    clock.now += 100.0
    for _ in range(4):
        call()
    with pytest.raises(RateLimited):
        call()


def test_concurrent_requests_are_counted_across_rotation(clock: Clock) -> None:
    old = Token(name="a", token=SECRET, concurrent_requests=2)
    new = Token(name="a", token=SECRET + "-2", concurrent_requests=2)
    limiter = RateLimiter(clock)
    with pytest.raises(KeyError), limiter.acquire(old):
        raise KeyError
    with limiter.acquire(old), limiter.acquire(new):
        with pytest.raises(RateLimited), limiter.acquire(new):
            pass
        assert limiter.in_flight("a") == 2
    assert limiter.in_flight("a") == 0


def test_token_repr_shows_no_secret() -> None:
    assert SECRET not in repr(Token(name="a", token=SECRET))


@pytest.mark.parametrize(
    ("secret", "limit"),
    [
        ("x" * 12_000, "4096"),
        ("x" * 4097, "4096"),
        ("y" * 20 + " z", "pattern"),
        ("é" * 20, "pattern"),
    ],
)
def test_token_that_no_header_carries_is_rejected(tmp_path: Path, secret: str, limit: str) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(f"tokens:\n  - {{name: user, token: '{secret}'}}\n")
    with pytest.raises(ConfigError, match=limit) as failed:
        TokenFile(path)
    assert secret not in str(failed.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o600])
def test_token_file_that_others_can_read_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text("tokens:\n  - {name: user, token: user-secret-0123456789}\n")
    path.chmod(mode)
    TokenFile(path)
    assert ("other users can read it" in caplog.text) == (mode != 0o600)
