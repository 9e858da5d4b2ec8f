"""The packages of servers that ladderstitch is compared with, in a folder of their own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from ladderstitch.errors import UserError
from ladderstitch.runtime.cache import cached_folder

PACKAGES = ("nvidia-pytriton==0.7.0", "onnxruntime==1.32.0", "numpy==1.26.4")
"""NVIDIA Triton 2.51 and what its Python backend needs.

ONNX Runtime is that of constraints.txt, so that both servers compute equally. numpy is the last
release before 2, with which outputs of the backend are empty."""
INSTALL_TIMEOUT_S = 900.0
TAIL_LINES = 15


class PeerError(UserError):
    """A server that ladderstitch is compared with is missing or does not work."""


def installed_packages() -> Path:
    """Return the folder of the packages in the cache; install them if the cache lacks them.

    Raises `PeerError` with the end of pip's output if pip fails.
    """
    key = f"{sys.version_info[:2]} {' '.join(PACKAGES)}"
    return cached_folder("peers", hashlib.sha256(key.encode()).hexdigest()[:16], _install)


def _install(folder: Path) -> None:
    """Install exactly `PACKAGES`: Triton needs none of the packages that PyTriton depends on."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
    try:
        subprocess.run(
            [*command, *PACKAGES],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        raise PeerError(
            f"pip could not install {', '.join(PACKAGES)}:\n{tail(error.stdout)}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PeerError(
            f"pip did not install {', '.join(PACKAGES)} within {INSTALL_TIMEOUT_S:.0f} s"
        ) from error


def tail(text: str) -> str:
    """Return the last 15 lines of a log."""
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])
