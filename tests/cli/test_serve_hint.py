"""What `serve` decides and says: its default HTTP port, and the command that it suggests."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from ladderstitch.addresses import DEFAULT_ADDRESS
from ladderstitch.bundles import find_bundle
from ladderstitch.cli.app import app
from ladderstitch.cli.ready_line import suggest_command
from ladderstitch.config import DEFAULT_HTTP_PORT, ServerConfig


def test_hint_of_a_server_with_tokens_and_tls_has_the_options() -> None:
    files = {"tls_certificate": Path("c"), "tls_key": Path("k"), "token_file": Path("t")}
    command = suggest_command(ServerConfig.model_validate(files), DEFAULT_ADDRESS)
    assert " --ca CA.pem --token-file TOKEN predict " in command
    assert command.endswith("--budget 100ms")


def test_hint_of_an_open_language_model_is_generate_alone() -> None:
    config = ServerConfig(bundle=find_bundle("elastic-text"))
    command = suggest_command(config, "127.0.0.1:22200")
    assert command.endswith(' generate "The capital of France is" --address 127.0.0.1:22200')
    assert "--token-file" not in command


def test_http_port_is_open_by_default_on_default_loopback_addresses_only() -> None:
    assert ServerConfig().with_default_http().http_port == DEFAULT_HTTP_PORT
    assert ServerConfig(port=8002).with_default_http().http_port is None
    assert ServerConfig(host="10.0.0.1", insecure_public=True).with_default_http().http_port is None


def test_page_without_http_is_refused_before_the_server_starts() -> None:
    result = CliRunner().invoke(app, ["serve", "--no-ray", "--page", "on", "--no-http"])
    assert result.exit_code == 2
    assert "page: expected http_port along with it and --no-http" in result.output
