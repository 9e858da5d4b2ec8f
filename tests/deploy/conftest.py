"""Binaries that some tests run; where one is absent, its tests say so and are skipped."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Path of a binary out of `make tools`, or of the system's."""
    beside = Path(sys.executable).parent.parent / "tools" / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here; `make tools` fetches it")
    return found


@pytest.fixture(scope="session")
def helm() -> str:
    return tool("helm")


@pytest.fixture(scope="session")
def kubectl() -> str:
    return tool("kubectl")
