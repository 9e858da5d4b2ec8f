"""The wheels of the server and of the client, built and installed as users install them."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import ladderstitch
from tests.support.servers import RunningServer, picture, server

__all__ = ["server"]

ROOT = Path(__file__).parents[2]
MAX_MIB = 60
PREDICT = """
import json, sys
from ladderstitch_client import Client

with Client(sys.argv[1]) as client:
    answer = client.predict(sys.stdin.buffer.read(), budget_s=1.0)
    try:
        answer.logits
    except ModuleNotFoundError as error:
        missing = str(error)
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps([answer.label, answer.budget_met, client.health(), missing, loaded]))
"""


def run(*command: object) -> str:
    """Run a command to its end; skips the test if it could not reach the package index."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd="/")
    if done.returncode and re.search(
        r"No matching distribution|Temporary failure|Connection|Retrying", done.stderr
    ):
        pytest.skip(f"the package index cannot be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, folder: Path) -> zipfile.Path:
    """Return the root of the wheel of a source folder."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return zipfile.Path(wheel)


def metadata(wheel: zipfile.Path) -> email.message.Message:
    """Return the metadata of a wheel."""
    (folder,) = (entry for entry in wheel.iterdir() if entry.name.endswith(".dist-info"))
    return email.message_from_string((folder / "METADATA").read_text())


@pytest.fixture(scope="module")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    return build(ROOT / "clients" / "python", tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def server_wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    return build(ROOT, tmp_path_factory.mktemp("server"))


def test_versions_are_equal() -> None:
    stated = {
        tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"]
        for folder in (ROOT, ROOT / "clients" / "python")
    }
    assert stated == {ladderstitch.__version__}


def test_wheels_share_no_file_and_hold_the_protocol(
    client_wheel: zipfile.Path, server_wheel: zipfile.Path
) -> None:
    files = [set(wheel.root.namelist()) for wheel in (client_wheel, server_wheel)]
    assert not files[0] & files[1]
    for names, package in zip(files, ("ladderstitch_client", "ladderstitch"), strict=True):
        for source in (ROOT / "protos").rglob("*.proto"):
            assert f"{package}/protos/{source.relative_to(ROOT / 'protos')}" in names
        assert f"{package}/py.typed" in names
    assert not any("torch" in name for name in metadata(client_wheel).get_all("Requires-Dist", []))


@pytest.mark.parametrize("wheel", ["client_wheel", "server_wheel"])
def test_package_pages_refer_to_no_file(wheel: str, request: pytest.FixtureRequest) -> None:
    described = metadata(request.getfixturevalue(wheel))
    page = described.get_payload()
    assert isinstance(page, str)
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert all(link.startswith("https://") for link in links)
    assert {"Author", "License-Expression", "Classifier", "Project-URL"} <= set(described.keys())


def test_client_wheel_is_small_and_calls_a_server(
    client_wheel: zipfile.Path, server: RunningServer, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    wheel = client_wheel.root.filename
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", wheel)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file())
    assert 1 < size >> 20 <= MAX_MIB
    done = subprocess.run(
        [python, "-I", "-c", PREDICT, server.address],
        input=picture(),
        capture_output=True,
        check=True,
    )
    label, met, health, missing, loaded = json.loads(done.stdout)
    assert label in ("ankle", "bag", "coat", "dress")
    assert met is True
    assert health == "SERVING"
    assert "pip install numpy" in missing
    assert {"torch", "numpy", "ray", "ladderstitch"}.isdisjoint(loaded)
    command = tmp_path / "venv" / "bin" / "ladderstitch-client"
    bare = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert bare.returncode == 1
    assert "pip install 'ladderstitch-client[cli]'" in bare.stderr
