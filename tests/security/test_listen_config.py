"""What a server refuses to be configured as."""

from __future__ import annotations

from pathlib import Path

import pytest

from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError
from ladderstitch.security.listen_config import is_loopback

TLS = {"tls_certificate": Path("c"), "tls_key": Path("k")}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.1", "example.org", ""])
@pytest.mark.parametrize("locks", [{}, TLS, {"token_file": Path("t")}], ids=["", "tls", "tokens"])
def test_a_public_bind_needs_both_locks(host: str, locks: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="is reachable from other machines"):
        ServerConfig.load(None, dict(host=host, **locks))
    assert ServerConfig.load(None, dict(host=host, insecure_public=True, **locks)).host == host


def test_with_tls_and_tokens_any_address_will_do() -> None:
    assert (
        ServerConfig.load(None, dict(host="0.0.0.0", token_file=Path("t"), **TLS)).host == "0.0.0.0"
    )


def test_the_admin_port_is_no_way_around() -> None:
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
def test_half_a_configuration_is_refused(fields: dict[str, Path], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerConfig.load(None, fields)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_is_known(address: str) -> None:
    assert is_loopback(address)
