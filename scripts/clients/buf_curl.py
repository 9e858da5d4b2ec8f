# /// script
# dependencies = ["buf-bin==1.75.0"]
#
# [tool.ladderstitch]
# package = "buf-bin"
# quick = true
# ///
"""`buf curl`, which asks for the schema by reflection, version 1 first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BUF = Path(sys.executable).with_name("buf")
ADDRESS = f"http://{os.environ['LADDERSTITCH_GRPC']}"


def call(method: str, *options: str, data: str = "{}") -> list[dict[str, object]]:
    """Return the responses of a method."""
    command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    done = subprocess.run(
        [*command, *options, "--data", data, f"{ADDRESS}/{method}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].lstrip()
    return found


def main() -> None:
    for version in ("grpc-v1", "grpc-v1alpha"):
        reflect = ["--reflect", "--reflect-protocol", version]
        (ready,) = call("inference.GRPCInferenceService/ServerReady", *reflect)
        assert ready == {"ready": True}
        print(f"ok reflection {version}")
    (models,) = call("ladderstitch.v1.InferenceService/ListModels", "--reflect")
    names = {model["name"] for model in models["models"]}  # type: ignore[index,union-attr]
    assert os.environ["LADDERSTITCH_IMAGE_MODEL"] in names
    print("ok unary")
    request = {"model_name": os.environ["LADDERSTITCH_TEXT_MODEL"], "text": "a", "max_tokens": 3}
    method = "ladderstitch.v1.GenerationService/Generate"
    assert 1 <= len(call(method, "--reflect", data=json.dumps(request))) <= 3
    print("ok stream")


if __name__ == "__main__":
    main()
