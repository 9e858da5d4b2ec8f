"""The image's Dockerfile: order of its layers, its user, and steps that need no container."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from tests.deploy.conftest import tool
from tests.deploy.dockerfile import (
    DOCKERFILE,
    ROOT,
    command,
    environment,
    health_check,
    instructions,
    last,
    last_stage,
)


def test_image_passes_hadolint() -> None:
    done = subprocess.run(
        [tool("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout


def test_image_installs_the_commands_of_kuberay() -> None:
    installed = next(text for name, text in last_stage() if name == "RUN" and "apt-get" in text)
    assert {"bash", "wget"} <= set(installed.split())


def test_dependencies_are_installed_before_the_source_arrives() -> None:
    found = last_stage()
    (dependencies,) = (at for at, (_, text) in enumerate(found) if "-r requirements.txt" in text)
    (package,) = (at for at, (_, text) in enumerate(found) if "from=wheel" in text)
    assert dependencies < package
    copied = [text for name, text in found[:package] if name == "COPY"]
    assert copied == ["--from=requirements /src/constraints.txt /src/requirements.txt ./"]


def test_copied_files_exist_and_the_wheel_gets_all_that_it_contains() -> None:
    copied = [
        path
        for name, text in instructions()
        if name == "COPY" and "--from" not in text
        for path in text.split()[:-1]
    ]
    assert [path for path in copied if not (ROOT / path).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["only-include"], project["project"]["readme"], "LICENSE", "pyproject.toml"]
    for path in needed:
        assert any(Path(path).is_relative_to(folder) for folder in copied), path


def test_requirements_are_those_of_the_project(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    step = next(text for name, text in instructions() if name == "RUN" and "tomllib" in text)
    step = step.replace("python -c", f"{sys.executable} -c", 1)
    subprocess.run(["sh", "-c", step], cwd=tmp_path, check=True, timeout=500)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    extras = project["optional-dependencies"]
    assert lines == project["dependencies"] + extras["telemetry"]
    assert any(line.startswith("torch") for line in lines)


def test_image_runs_without_root_as_any_user_of_the_group_0() -> None:
    uid, _, gid = last("USER").partition(":")
    assert int(uid) > 0
    assert gid == "0"
    home = environment()["HOME"]
    assert any(f"chmod -R g=u {home}" in text for name, text in last_stage() if name == "RUN")
    assert last("WORKDIR") == home


def test_health_check_is_cheap_and_asks_readiness() -> None:
    text = " ".join(health_check())
    assert "python" not in text
    assert "ladderstitch" not in text
    assert text.endswith("/readyz")
    config = yaml.safe_load((ROOT / "examples/serve.yaml").read_text())
    assert environment()["METRICS_PORT"] == str(config["metrics_port"])


def test_image_serves_unless_told_otherwise() -> None:
    assert command()[:2] == ["ladderstitch", "serve"]
    assert not any(re.match(r"--(host|insecure)", part) for part in command())
