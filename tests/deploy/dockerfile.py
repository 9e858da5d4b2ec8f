"""The instructions of the image's Dockerfile."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "image" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return the instructions in order, each with its arguments on one line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, arguments.strip()) for name, _, arguments in pairs]


def last_stage() -> list[tuple[str, str]]:
    """Return the instructions of the stage that becomes the image."""
    found = instructions()
    start = max(at for at, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def last(name: str) -> str:
    """Return the arguments of the last instruction of a kind."""
    return [arguments for kind, arguments in last_stage() if kind == name][-1]


def environment() -> dict[str, str]:
    """Return the variables that the image sets."""
    parts = [part for kind, text in last_stage() if kind == "ENV" for part in shlex.split(text)]
    return dict(part.split("=", 1) for part in parts)


def command() -> list[str]:
    """Return the command that the image runs without arguments."""
    parts: list[str] = json.loads(last("ENTRYPOINT")) + json.loads(last("CMD"))
    return parts


def health_check() -> list[str]:
    """Return the command of the health check."""
    parts: list[str] = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    return parts
