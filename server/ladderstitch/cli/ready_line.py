"""The line that a server prints when it is ready, with a command that calls it."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from ladderstitch.addresses import DEFAULT_ADDRESS, join_address
from ladderstitch.bundles import EMBEDDED, is_language_bundle
from ladderstitch.cli.console import out
from ladderstitch.config import ServerConfig

if TYPE_CHECKING:
    pass  # imported late: the help page needs none

EXAMPLE_IMAGES = Path("examples/fashion-mnist/images")
"""Images for the embedded model in the repository; the package has others."""
UNKNOWN_BUDGET = "100ms"
HINT_TIMEOUT_S = 5.0
AROUND_COMPUTE_MS = 2
"""Milliseconds of a suggested budget for everything but the model."""


def print_ready(
    config: ServerConfig, port: int, metrics_port: int, http_port: int | None, started: float
) -> None:
    """Print one line: the addresses of the server, its page, and a command that calls it."""
    address = join_address(config.host, port)
    where = [
        f"gRPC on {address}",
        f"metrics on http://{join_address(config.host, metrics_port)}/metrics",
    ]
    if http_port is not None:
        scheme = "https" if config.tls_certificate is not None else "http"
        http = f"{scheme}://{join_address(config.host, http_port)}"
        where.append(f"OpenAI API on {http}/v1")
        if config.serves_page:
            where.insert(0, f"page on {http}/")
    command = suggest_command(config, address)
    out.print(
        f"[bold green]ready[/] after {time.monotonic() - started:.1f} s: "
        f"{escape(', '.join(where))}, try: {escape(command)}",
        soft_wrap=True,
        highlight=False,
    )


def suggest_command(config: ServerConfig, address: str) -> str:
    """Return a command that calls the server at an address, as a shell takes it."""
    option = [] if address == DEFAULT_ADDRESS else ["--address", address]
    access = " --ca CA.pem" if config.tls_certificate is not None else ""
    access += " --token-file TOKEN" if config.token_file is not None else ""
    program = _program() + access
    if is_language_bundle(config.bundle):
        return f'{program} generate "The capital of France is" {shlex.join(option)}'.rstrip()
    kind, budget = _suggest_call(config, address)
    return f"{program} predict {_example_images(config.bundle) or kind} " + shlex.join(
        ["--budget", budget, *option]
    )


def _program() -> str:
    """Return how this program was started, the shortest form that works in this folder."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return shlex.join([sys.executable, "-m", "ladderstitch"])
    found = shutil.which(started.name)
    on_path = found is not None and Path(found).resolve() == started.resolve()
    return shlex.quote(started.name if on_path else str(started))


def _example_images(bundle: Path) -> str:
    """Return a pattern of the example images of a bundle; empty if it has none."""
    if bundle == EMBEDDED and EXAMPLE_IMAGES.is_dir():
        return f"{EXAMPLE_IMAGES}/*.png"
    folder = bundle / "examples"
    return f"{shlex.quote(str(folder))}/*.png" if any(folder.glob("*.png")) else ""


def _suggest_call(config: ServerConfig, address: str) -> tuple[str, str]:
    """Return a name of an input, and a budget that this machine keeps with the best variant.

    Without an answer, e.g. because only callers with credentials get one, it is 100 ms: a server
    that has started does not end because of a hint.
    """
    from ladderstitch.client import Client, RequestFailed

    if config.tls_certificate is not None or config.token_file is not None:
        return "IMAGE.png", UNKNOWN_BUDGET
    try:
        with Client(address, timeout_s=HINT_TIMEOUT_S) as client:
            model = client.get_model()
    except RequestFailed:
        return "IMAGE.png", UNKNOWN_BUDGET
    planned_us = {v.id: v.planned_latency_us for v in model.variants if v.id in model.frontier}
    budget = f"{math.ceil(2 * max(planned_us.values()) / 1e3 + AROUND_COMPUTE_MS)}ms"
    return "IMAGE.png" if model.HasField("preprocessing") else "INPUTS.npy", budget
