"""The token file: what it may hold, how it is reread, and what its mistakes look like."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ladderstitch.errors import ConfigError, RateLimited
from ladderstitch.security.tokens import CHECK_S, Limits, Token, TokenFile, digest_of, load_tokens

SECRET = "a-secret-of-some-length"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def write(path: Path, text: str) -> Path:
    """A new file in the old one's place, as secrets are rotated."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)
    return path


def test_a_token_is_found_by_its_secret_or_its_digest(tmp_path: Path) -> None:
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
        (f"{{{SECRET}", "not YAML"),
        (f"- {SECRET}", "token_file"),
    ],
)
def test_mistakes_are_named_without_showing_a_secret(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = write(tmp_path / "tokens.yaml", text)
    with pytest.raises(ConfigError, match=reason) as refused:
        load_tokens(path)
    assert SECRET not in str(refused.value)
    assert "short-secret" not in str(refused.value)


def test_a_new_file_is_in_force_within_a_second_and_a_broken_one_is_not(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "tokens.yaml", f"tokens: [{{name: a, token: {SECRET}}}]")
    tokens = TokenFile(path, clock=clock)
    write(path, "tokens: [{name: b, token: the-next-secret-of-all}]")
    assert tokens.find(SECRET) is not None
    clock.now += CHECK_S
    assert tokens.find(SECRET) is None
    assert tokens.find("the-next-secret-of-all") is not None
    write(path, "tokens: nonsense")
    clock.now += CHECK_S
    assert tokens.find("the-next-secret-of-all") is not None
    assert "the old tokens stay in force" in caplog.text
    path.unlink()
    clock.now += CHECK_S
    assert tokens.find("the-next-secret-of-all") is not None


def test_requests_a_second_are_a_bucket_of_one_second(clock: Clock) -> None:
    token = Token(name="a", token=SECRET, requests_per_s=4)
    limits = Limits(clock)

    def call() -> None:
        with limits.admitted(token):
            pass

    for _ in range(4):
        call()
    with pytest.raises(RateLimited) as refused:
        call()
    assert refused.value.retry_after_s == pytest.approx(0.25)
    clock.now += 0.25
    call()
    with pytest.raises(RateLimited):
        call()
    clock.now += 100.0
    for _ in range(4):
        call()
    with pytest.raises(RateLimited):
        call()


def test_places_are_freed_however_a_call_ends_and_survive_a_rotation(clock: Clock) -> None:
    old = Token(name="a", token=SECRET, concurrent_requests=2)
    new = Token(name="a", token=SECRET + "-2", concurrent_requests=2)
    limits = Limits(clock)
    with pytest.raises(KeyError), limits.admitted(old):
        raise KeyError
    with limits.admitted(old), limits.admitted(new):
        with pytest.raises(RateLimited), limits.admitted(new):
            pass
        assert limits.in_flight("a") == 2
    assert limits.in_flight("a") == 0


def test_a_secret_does_not_show_in_its_tokens_repr() -> None:
    assert SECRET not in repr(Token(name="a", token=SECRET))
