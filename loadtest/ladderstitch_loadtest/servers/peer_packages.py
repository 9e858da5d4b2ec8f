"""The packages of servers that ladderstitch is compared with, in a folder of their own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ladderstitch.errors import UserError
from ladderstitch.runtime.cache import cached_folder

TRITON = ("nvidia-pytriton==0.7.0", "onnxruntime==1.32.0", "numpy==1.26.4")
"""NVIDIA Triton 2.51 and what its Python backend needs.

ONNX Runtime is that of constraints.txt, so that both servers compute equally. numpy is the last
release before 2, with which outputs of the backend are empty."""
LLAMA_CPP = ("xllamacpp==2026.10.11549",)
"""llama.cpp with its server, as a wheel."""
INSTALL_TIMEOUT_S = 900.0
TAIL_LINES = 15


class PeerError(UserError):
    """A server that ladderstitch is compared with is missing or does not work."""


def installed_packages(packages: Sequence[str]) -> Path:
    """Return the folder of the packages in the cache; install them if the cache lacks them.

    Exactly these are installed: Triton needs none of the packages that PyTriton depends on. Raises
    `PeerError` with the end of pip's output if pip fails.
    """
    key = f"{sys.version_info[:2]} {' '.join(packages)}"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return cached_folder("peers", name, lambda folder: _install(packages, folder))


def _install(packages: Sequence[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
    try:
        subprocess.run(
            [*command, *packages],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        raise PeerError(
            f"pip could not install {', '.join(packages)}:\n{tail(error.stdout)}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PeerError(
            f"pip did not install {', '.join(packages)} within {INSTALL_TIMEOUT_S:.0f} s"
        ) from error


def tail(text: str) -> str:
    """Return the last 15 lines of a log."""
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])
