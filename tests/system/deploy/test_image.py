"""The image's server as deploy/README.md starts it, without a container engine."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml

from tests.conftest import make_tiny_bundle
from tests.deploy.dockerfile import environment, health_check
from tests.support.servers import READY
from tests.system.deploy.image_sandbox import ROOT, command_in_image, skip_without_namespaces

README = (ROOT / "deploy/README.md").read_text()
LOCAL = {"--host": "127.0.0.1", "--port": "0", "--metrics-port": "0"}
"""Options that the test changes: loopback only, free ports."""


def block_with(text: str) -> str:
    """Return the shell commands of the only block of the README that contains a text."""
    (found,) = (b for b in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if text in b)
    return str(found)


def server_arguments() -> list[str]:
    """Return what `docker run` of the README passes to the image's entry point."""
    joined = block_with("docker run").replace("\\\n", " ")
    (line,) = (line for line in joined.splitlines() if line.startswith("docker run"))
    words = shlex.split(line)
    (image,) = (at for at, word in enumerate(words) if re.fullmatch(r"ladderstitch:[\d.]+", word))
    return words[image + 1 :]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the token files that the README's commands make."""
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run(["sh", "-ec", block_with("add_token()")], cwd=folder, check=True, timeout=500)
    return folder


@pytest.fixture(scope="module")
def image_server(secrets: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Yield the process of the server in the image's environment, its address, its metrics port."""
    skip_without_namespaces()
    arguments = server_arguments()
    for name, value in LOCAL.items():
        if name in arguments:
            arguments[arguments.index(name) + 1] = value
        else:
            arguments += [name, value]
    make_tiny_bundle(secrets / "tiny")  # the embedded model would be exported and measured first
    inputs = {secrets / "tokens.yaml": "secrets/tokens.yaml", secrets / "tiny": "tiny"}
    arguments += ["--bundle", "/run/tiny"]
    command = command_in_image(inputs, sys.executable, "-m", "ladderstitch", *arguments)
    log = secrets / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    with process.stdout:
        try:
            ready = READY.match(process.stdout.readline())
            assert ready is not None, log.read_text()
            port = re.search(r":(\d+)/metrics", ready[2])
            assert port is not None
            yield process, ready[1], port[1]
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=300) == 0


def ladderstitch(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line on a server."""
    command = [sys.executable, "-m", "ladderstitch", *arguments, "--address", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def check_health(metrics_port: str) -> int:
    """Return the exit status of the image's health check."""
    variables = environment() | {"METRICS_PORT": metrics_port, "PATH": "/usr/bin:/bin"}
    return subprocess.run(health_check(), env=variables, timeout=500).returncode


def test_tokens_of_the_readme_are_those_of_the_file(secrets: Path) -> None:
    from ladderstitch.security.tokens import load_tokens

    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets.glob("*token*"))
    tokens = {token.name: token for token in load_tokens(secrets / "tokens.yaml").values()}
    assert {name: sorted(token.scopes) for name, token in tokens.items()} == {
        "caller": ["inference"],
        "gateway": ["inference"],
        "drain": ["admin"],
    }


def test_arguments_of_the_compose_file_are_those_of_the_readme() -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    compose = " ".join(services["server"]["command"]).replace("=", " ").split()
    assert set(server_arguments()) < set(compose)
    assert set(compose) - set(server_arguments()) == {"--http-port", "8081"}


def test_server_runs_as_any_user_on_a_read_only_root(
    secrets: Path, image_server: tuple[subprocess.Popen[str], str, str]
) -> None:
    process, address, metrics_port = image_server
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert re.search(r"^Uid:\s+12345\s", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert check_health(metrics_port) == 0
    called = ladderstitch(address, "--token-file", str(secrets / "caller-token"), "health")
    assert called.returncode == 0, called.stderr
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=300)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_drain_token_drains_and_ends_readiness(
    secrets: Path, image_server: tuple[subprocess.Popen[str], str, str]
) -> None:
    _, address, metrics_port = image_server
    refused = ladderstitch(address, "--token-file", str(secrets / "caller-token"), "drain")
    assert refused.returncode != 0
    assert "PERMISSION_DENIED" in refused.stderr + refused.stdout
    drained = ladderstitch(
        address, "--token-file", str(secrets / "drain-token"), "drain", "--announce=0s"
    )
    assert drained.returncode == 0, drained.stderr
    assert check_health(metrics_port) != 0


def test_server_without_a_writable_folder_says_so() -> None:
    skip_without_namespaces()
    serve = (sys.executable, "-m", "ladderstitch", "serve", "--no-ray", "--port", "0")
    command = command_in_image({}, *serve, "--metrics-port", "0", volumes=False)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode != 0
    assert "LADDERSTITCH_CACHE: expected a folder to write to, got none" in done.stderr
    assert "Traceback" not in done.stderr
