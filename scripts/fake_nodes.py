"""A Ray cluster with Ray's own autoscaler, whose nodes are processes of this machine."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""Node id of the head, which the provider of fake nodes fixes."""
IDLE_MINUTES = 0.1
OBJECT_STORE_BYTES = 80 << 20


def autoscaler_config(max_nodes: int, gcs: str) -> dict[str, Any]:
    """Return a configuration with one type of node that fits one replica; the head fits none."""
    empty: dict[str, Any] = {}
    return {
        "cluster_name": "fake",
        "max_workers": max_nodes,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs,
            "head_node_id": HEAD,
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": empty, "max_workers": 0},
            "replica": {
                "resources": {"CPU": 1, "object_store_memory": OBJECT_STORE_BYTES},
                "node_config": empty,
                "min_workers": 0,
                "max_workers": max_nodes,
            },
        },
        "head_node_type": "ray.head.default",
        "auth": empty,
        "docker": empty,
        "file_mounts": empty,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "upscaling_speed": 10,
    }


@contextmanager
def fake_cluster(max_nodes: int) -> Iterator[None]:
    """Start a head, an autoscaler of up to `max_nodes` nodes, and Serve for the `with` block.

    Only processes of the head's own process group are stopped at the end.
    """
    folder = Path(tempfile.mkdtemp(prefix="ls-"))  # short: socket paths are limited to 107 bytes
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    port = _free_port()
    address = f"127.0.0.1:{port}"
    (folder / "nodes.json").write_text(json.dumps(autoscaler_config(max_nodes, address)))
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    head = _start_head(folder, port)
    import ray  # reads the environment when it is imported
    from ray import serve

    try:
        _connect(ray, address, head)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        yield
    finally:
        ray.shutdown()
        _stop_head(head)
        shutil.rmtree(folder, ignore_errors=True)


def node_count() -> int:
    """Return the number of live nodes without the head."""
    import ray

    return sum(node["Alive"] for node in ray.nodes()) - 1


def _start_head(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=0", "--num-gpus=0"]
    command += ["--include-dashboard=false", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--temp-dir={folder}", f"--autoscaling-config={folder / 'nodes.json'}"]
    command += ["--disable-usage-stats"]
    environment = os.environ | {
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
    }
    with (folder / "head.log").open("wb") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def _connect(ray: Any, address: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while True:
        try:
            ray.init(address=address, namespace="ladderstitch", logging_level=logging.WARNING)
            return
        except (ConnectionError, RuntimeError) as error:
            if time.monotonic() > deadline or head.poll() is not None:
                raise SystemExit(f"the head did not start: {error}") from error
            time.sleep(1.0)


def _stop_head(head: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(head.pid, number)
        with suppress(subprocess.TimeoutExpired):
            head.wait(timeout=60)


def _free_port() -> int:
    """Return a free port below those that Ray assigns to workers."""
    for port in range(6380, 6480):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SystemExit("no free port between 6380 and 6480")
