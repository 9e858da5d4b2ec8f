"""A private Ray cluster on this machine for `ladderstitch serve`; no files remain after it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError

OBJECT_STORE_BYTES = 80 << 20


class Cluster:
    """A running Ray with Serve."""

    def run(self, config: ServerConfig) -> tuple[int, int]:
        """Deploy the model and wait until requests are answered.

        Returns the gRPC port and the metrics port. Raises `ConfigError` if the deployment fails.
        """
        from ray import serve

        from ladderstitch.ray_serve.application import APP, application

        try:
            handle = serve.run(application(config), name=APP, route_prefix=None)
        except RuntimeError as error:
            raise ConfigError(f"the deployment failed: {error}") from error
        ports: tuple[int, int] = handle.ports.remote().result(timeout_s=30)
        return ports

    def drain(self) -> None:
        """Let all replicas and gateways finish their accepted requests, then stop them."""
        from ray import serve

        from ladderstitch.ray_serve.application import APP

        serve.delete(APP)


@contextmanager
def local_ray(actors: int = 1) -> Iterator[Cluster]:
    """Start Ray and Serve for the `with` block, in a temporary directory of their own.

    Ray is given at least one core per actor, because a user who configures more ranks than this
    machine has cores wants them to share cores.

    `address="local"` never joins another cluster on this machine. Token authentication is on,
    because Ray's control plane listens on all interfaces. Raises `RuntimeError` if Ray has been
    imported already: it would not see its token.
    """
    if "ray" in sys.modules:
        raise RuntimeError("ray: expected to be imported inside `with local_ray()`, not before")
    folder = Path(tempfile.mkdtemp(prefix="ls-"))  # short: socket paths are limited to 107 bytes
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # its default 15 yields to every other process of the machine
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Serve's gRPC server and ours share a completion queue: on two event loops, each event of
        # either wakes both, and half of the events are handled by the wrong loop.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # uvloop is slower under gRPC's wake-ups: 0.66 instead of 0.62 ms at one caller.
        "RAY_USE_UVLOOP": "0",
    }
    import ray  # reads the environment when it is imported
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    try:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=max(os.cpu_count() or 1, actors),
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            namespace="ladderstitch",
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        yield Cluster()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
