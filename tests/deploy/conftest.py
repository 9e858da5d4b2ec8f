"""Binaries that some tests run; tests whose binary is missing are skipped."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Return the path of a binary from `make tools` or from the PATH; skip the test without it."""
    local = Path(sys.executable).parent.parent / "tools" / name
    found = str(local) if local.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; `make tools` fetches it")
    return found


@pytest.fixture(scope="session")
def helm() -> str:
    """Return the path of helm."""
    return tool("helm")


@pytest.fixture(scope="session")
def kubectl() -> str:
    """Return the path of kubectl."""
    return tool("kubectl")
