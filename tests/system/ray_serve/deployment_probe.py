"""Deploy declaratively on Ray Serve and change `user_config`, as `serve deploy` and KubeRay do.

`test_application.py` runs this in a separate process; it prints the observations as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import grpc

from ladderstitch.client import Client, infer_request
from ladderstitch.ray_serve.local_cluster import local_ray
from tests.support.servers import pixels

APP = "ladderstitch"


def deploy(bundle: str, ports: tuple[int, int], user_config: dict[str, object]) -> None:
    """Deploy like `serve deploy FILE`."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    application = {
        "name": APP,
        "route_prefix": None,
        "import_path": "ladderstitch.ray_serve.application:build",
        "args": {"bundle": bundle, "port": ports[0], "metrics_port": ports[1]},
        "deployments": [{"name": "replica", "user_config": user_config}],
    }
    schema = ServeDeploySchema.model_validate({"applications": [application]})
    _get_global_client().deploy_apps(schema)


def wait_for_variant(port: int, variant: int) -> str:
    """Wait until requests are answered with the variant; return the name of the replica."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            with Client(f"127.0.0.1:{port}") as client:
                response = client.inference.Infer(infer_request(pixels()), timeout=2)
        except grpc.RpcError:
            time.sleep(0.1)
            continue
        if response.accounting.variant_id == variant:
            return response.accounting.replica
        time.sleep(0.02)
    raise AssertionError(f"variant {variant} never answered")


def probe(bundle: str, port: int, metrics_port: int) -> dict[str, object]:
    """Return what a client sees after each change of settings."""
    seen: dict[str, object] = {}
    ports = (port, metrics_port)
    with local_ray():
        deploy(bundle, ports, {"pinned_variant": 4})
        first = wait_for_variant(port, 4)
        deploy(bundle, ports, {"pinned_variant": 9})
        seen["same_replica"] = wait_for_variant(port, 9) == first
        with Client(f"127.0.0.1:{port}") as client:
            client.update_scheduling(pinned_variant=2)
            seen["after_admin"] = client.predict(pixels()).variant
        deploy(bundle, ports, {"pinned_variant": 9})  # unchanged, so the administrator's pin stays
        time.sleep(2.0)
        with Client(f"127.0.0.1:{port}") as client:
            seen["after_repeat"] = client.predict(pixels()).variant
            deploy(bundle, ports, {"policy": "fixed", "fixed_variant": 11, "pinned_variant": None})
            wait_for_variant(port, 11)
            seen["revision"] = client.get_scheduling().revision
    return seen


if __name__ == "__main__":
    json.dump(probe(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), sys.stdout)
