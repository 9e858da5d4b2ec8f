"""A private Ray cluster on this machine for `ladderstitch serve`; no files remain after it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ladderstitch.addresses import is_loopback
from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError, LadderstitchError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20
FOLDER_PREFIX = "ls-"
LOCK = "lock"
"""File in the folder of a cluster whose lock the process that started it holds."""
NEEDED = ("gcs_server", "raylet")
"""Ray's processes without which a cluster cannot go on."""
END_TIMEOUT_S = 5.0


class ClusterLost(LadderstitchError):
    """An error because a process of Ray has died without which nothing can be deployed."""


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

    def check(self) -> None:
        """Raise `ClusterLost` if a process of Ray that is needed has died."""
        import ray

        node = ray._private.worker._global_node
        dead: list[str] = [] if node is None else [name for name, _ in node.dead_processes()]
        for name in NEEDED:
            if name in dead:
                raise ClusterLost(f"Ray's {name} has died; the server ends")


@contextmanager
def local_ray(actors: int = 1) -> Iterator[Cluster]:
    """Start Ray and Serve for the `with` block, in a temporary directory of their own.

    Ray is given at least one core per actor, because a user who configures more ranks than this
    machine has cores wants them to share cores. What clusters have left whose `serve` was killed is
    removed first.

    `address="local"` never joins another cluster on this machine. All of Ray's processes listen on
    loopback only, and require a token. Ray makes its own directory accessible to all users; the
    one around it, with the token, is not. After `ClusterLost`, and after an interruption, Ray's
    processes are killed, and this one must end: a client of Ray does not outlive it. Raises
    `RuntimeError` if Ray has been imported already: it would not see its token.
    """
    if "ray" in sys.modules:
        raise RuntimeError("ray: expected to be imported inside `with local_ray()`, not before")
    remove_abandoned(Path(tempfile.gettempdir()))
    with _private_folder() as folder:
        at_once = False
        try:
            _start(folder, actors)
            yield Cluster()
        except BaseException as error:
            at_once = isinstance(error, ClusterLost) or not isinstance(error, Exception)
            raise
        finally:
            if not at_once:
                _shut_down()
            _end_processes(folder)


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Create a locked folder (mode 0700) for a cluster, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))  # short: socket paths have 107 bytes
    try:
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """End the processes and remove the folders of clusters whose `serve` was killed."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's folder, or one that is being removed
            if folder.stat().st_uid != os.getuid() or not (folder / LOCK).exists():
                continue
            with (folder / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                log.warning("removing what a killed server has left: %s", folder)
                _end_processes(folder)


def _end_processes(folder: Path) -> None:
    """Kill all processes but this one that were started with a cluster's token, and its files.

    The raylet is killed last, because Ray ends this process when it notices that.
    """
    mark = f"RAY_AUTH_TOKEN_PATH={_token(folder)}".encode()
    for kept in (b"/raylet", b""):
        deadline = time.monotonic() + END_TIMEOUT_S
        while (found := _find_processes(mark, kept)) and time.monotonic() < deadline:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        shutil.rmtree(folder, ignore_errors=True)


def _find_processes(variable: bytes, kept: bytes) -> list[int]:
    """Return the other processes of this user that have a variable in their environment.

    Those whose executable ends in `kept` are left out, if it is not empty.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):  # without /proc there are none
        with contextlib.suppress(OSError):  # ended, or another user's
            pid = int(entry.name)
            executable = (entry / "cmdline").read_bytes().partition(b"\0")[0]
            if pid == os.getpid() or (kept and executable.endswith(kept)):
                continue
            if variable in (entry / "environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def _token(folder: Path) -> Path:
    return folder / "token"


def _start(folder: Path, actors: int) -> None:
    """Start Ray and Serve."""
    token = _token(folder)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # A node whose address is 127.0.0.1 listens on loopback only. `ray.init` replaces a given
        # loopback address by another one, unless this variable says that there is one node only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
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

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(os.cpu_count() or 1, actors),
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(folder / "r"),
        namespace="ladderstitch",
        log_to_driver=True,
        logging_level=logging.WARNING,
    )
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})


def keep_serve_on_loopback() -> None:
    """Let Serve's own gRPC server of this process listen on loopback if its node does.

    Ray Serve binds it to all interfaces. A deployment calls this in its constructor, before Serve
    starts that server.
    """
    import ray

    replica: Any = import_module("ray.serve._private.replica")

    if is_loopback(ray.util.get_node_ip_address()):
        bind = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, _: bind(server, "127.0.0.1:0")


def _shut_down() -> None:
    """Disconnect from Ray and end its processes."""
    ray: Any = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()
