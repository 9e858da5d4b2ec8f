"""Paths with groups of blocks behind a real server: chosen by id, in both runtimes; bad groups."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ladderstitch.client import Client
from tests.support.grouped_resnets import (
    GROUPS,
    IMAGE_SHAPE,
    bundle_logits,
    grouped_config,
    write_grouped_bundle,
)
from tests.support.servers import start_server, stop_server


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_served_paths_equal_the_reference(runtime: str, tmp_path: Path) -> None:
    bundle = write_grouped_bundle(tmp_path / "net", grouped_config())
    images = np.random.default_rng(0).standard_normal((3, *IMAGE_SHAPE), np.float32)
    server = start_server(bundle.path, tmp_path / "log", "--runtime", runtime)
    try:
        with Client(server.address) as client:
            answers = {
                name: client.predict(images, variant=variant)
                for variant, name in enumerate((None, *GROUPS))
            }
            relaxed = client.predict(images[:1], budget_s=60.0)
    finally:
        code = stop_server(server)
    assert code == 0
    for name, answer in answers.items():
        assert answer.variant_name == (name or "anchor-0")
        wanted = bundle_logits(bundle, torch.from_numpy(images), name).numpy()
        np.testing.assert_allclose(answer.logits, wanted, atol=2e-4, rtol=1e-3)
    assert relaxed.variant_name == "anchor-0"  # it has the highest quality


def test_serving_groups_that_overlap_fails_with_the_field(tmp_path: Path) -> None:
    path = write_grouped_bundle(tmp_path, grouped_config()).path / "model.yaml"
    fields = yaml.safe_load(path.read_text())
    fields["config"]["grouped_paths"][0]["groups"][2] = [[1, 2], [2, 2]]
    path.write_text(yaml.safe_dump(fields))
    command = [sys.executable, "-m", "ladderstitch", "serve", "--no-ray", "--port", "0"]
    command += ["--metrics-port", "0", "--bundle", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 2
    message = " ".join(found.stderr.split())
    assert "grouped_paths.pair.groups: expected groups of at least 1 of blocks 1 to 3" in message
    assert "got [2, 2]" in message
