"""Configurations of addresses and access that are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ladderstitch.addresses import is_loopback, join_address, split_address
from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError

TLS = {"tls_certificate": Path("c"), "tls_key": Path("k")}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.1", "example.org", ""])
@pytest.mark.parametrize("access", [{}, TLS, {"token_file": Path("t")}], ids=["", "tls", "tokens"])
def test_public_address_needs_tls_and_tokens(host: str, access: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="is reachable from other machines"):
        ServerConfig.load(None, dict(host=host, **access))
    assert ServerConfig.load(None, dict(host=host, insecure_public=True, **access)).host == host


def test_public_address_with_tls_and_tokens_is_accepted() -> None:
    assert (
        ServerConfig.load(None, dict(host="0.0.0.0", token_file=Path("t"), **TLS)).host == "0.0.0.0"
    )


def test_public_admin_address_needs_tls_and_tokens() -> None:
    with pytest.raises(ConfigError, match="admin_host"):
        ServerConfig.load(None, {"admin_port": 0, "admin_host": "0.0.0.0"})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tls_certificate": Path("c")}, "tls_key"),
        ({"tls_key": Path("k")}, "tls_key"),
        ({"tls_client_ca": Path("a")}, "tls_client_ca"),
    ],
)
def test_incomplete_tls_files_are_rejected(fields: dict[str, Path], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerConfig.load(None, fields)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"port": 99_999}, "port: expected less than or equal to 65535, got 99999"),
        ({"threads": "x"}, "threads: expected a valid integer or 'auto', got 'x'"),
        ({"prot": 1}, "prot: expected a known field such as port, got an unknown one"),
        ({"scheduling": {"prot": 1}}, "scheduling.prot: expected a known field, got an unknown"),
        ({"scheduling": {"queue_limit_s": 0}}, "scheduling.queue_limit_s: expected greater than 0"),
    ],
)
def test_wrong_field_is_named_with_the_expected_value(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServerConfig.load(None, fields)
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value), "the text of pydantic"


def test_all_wrong_fields_of_a_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("port: many\nmetrics_port: -1\n")
    with pytest.raises(ConfigError) as error:
        ServerConfig.load(path)
    first, second = str(error.value).split("; ")
    assert first == f"{path}: port: expected a valid integer, got 'many'"
    assert second == "metrics_port: expected greater than or equal to 0, got -1"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_is_loopback_recognises_local_addresses(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:8001", ("127.0.0.1", 8001)),
        ("[::1]:8001", ("::1", 8001)),
        ("[fe80::1%eth0]:0", ("fe80::1%eth0", 0)),
        ("name.example:65535", ("name.example", 65_535)),
    ],
)
def test_address_is_split_and_joined(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts
    assert join_address(*parts) == address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("::1:8001", "brackets"),
        ("8001", "HOST:PORT"),
        (":8001", "HOST:PORT"),
        ("[]:8001", "HOST:PORT"),
        ("host:", "HOST:PORT"),
        ("host:65536", "HOST:PORT"),
        ("host:-1", "HOST:PORT"),
        ("host:\u0663", "HOST:PORT"),
    ],
)
def test_other_text_is_no_address(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_address(address)
