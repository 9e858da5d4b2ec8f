"""What Triton is started with, and the errors if it does not start; Triton itself is not needed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ladderstitch.bundles import EMBEDDED
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models import graphs
from ladderstitch.vision.preprocessing import ImageReader
from ladderstitch_loadtest.servers import peer_packages
from ladderstitch_loadtest.servers.peer_packages import TRITON, PeerError, installed_packages
from ladderstitch_loadtest.servers.triton import PYTHON, format_command, triton_server
from ladderstitch_loadtest.servers.triton_repository import (
    MODEL_CODE,
    add_preprocessing,
    format_config,
)

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def make_identity() -> onnx.ModelProto:
    """Return a graph that returns its float32 images [B, 1, 28, 28]."""
    shape = ["batch", 1, 28, 28]
    graph = helper.make_graph(
        [helper.make_node("Identity", [graphs.INPUT], [graphs.OUTPUT])],
        "identity",
        [helper.make_tensor_value_info(graphs.INPUT, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(graphs.OUTPUT, TensorProto.FLOAT, shape)],
    )
    imports = [helper.make_opsetid("", graphs.OPSET)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def make_packages(folder: Path, script: str) -> Path:
    """Write packages whose `tritonserver` is a shell script."""
    home = folder / "pytriton" / "tritonserver"
    stub = home / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    for path in (home / "bin" / "tritonserver", stub):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    (home / "backends" / "python").mkdir(parents=True)
    return folder


def test_add_preprocessing_normalises_as_the_server_does(tmp_path: Path) -> None:
    reader = ImageReader(VisionBundle.load(EMBEDDED).manifest.preprocessing)
    model = make_identity()
    add_preprocessing(model, reader.scale, reader.shift)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28)).astype(np.uint8)
    (found,) = session.run(("logits",), {"images": pixels})
    np.testing.assert_allclose(found, reader.normalise(pixels), atol=1e-6)


def test_format_config_has_dynamic_batching_and_one_instance() -> None:
    config = format_config("net", (3, 8, 4), 10)
    for line in (
        'name: "net"',
        'backend: "python"',
        "max_batch_size: 32",
        'input [ { name: "images" data_type: TYPE_UINT8 dims: [ 3, 8, 4 ] } ]',
        'output [ { name: "logits" data_type: TYPE_FP32 dims: [ 10 ] } ]',
        "dynamic_batching { }",
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
    ):
        assert line in config.splitlines()


def test_format_command_binds_grpc_to_loopback_only() -> None:
    command = format_command(Path("/home"), Path("/models"), "127.0.0.1:8123")
    assert {"--grpc-address=127.0.0.1", "--grpc-port=8123"} < set(command)
    assert {"--allow-http=false", "--allow-metrics=false"} < set(command)


def test_model_code_answers_each_request_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Any = ModuleType("triton_python_backend_utils")
    backend.get_input_tensor_by_name = lambda request, name: request[name]
    backend.Tensor = lambda name, values: (name, values)
    backend.InferenceResponse = list
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.setenv("LADDERSTITCH_PEERS", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = make_identity()
    add_preprocessing(model, np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32))
    (tmp_path / "1").mkdir()
    onnx.save(model, tmp_path / "1" / "model.onnx")

    code = runpy.run_path(str(MODEL_CODE))["TritonPythonModel"]()
    assert sys.path[0] == str(tmp_path)
    code.initialize({"model_repository": str(tmp_path), "model_version": "1"})
    images = [np.full((size, 1, 28, 28), size, np.uint8) for size in (1, 3, 2)]
    requests = [{"images": SimpleNamespace(as_numpy=lambda one=one: one)} for one in images]
    for asked in (requests, requests[:1]):
        responses = code.execute(asked)
        assert len(responses) == len(asked)
        for ((name, logits),), image in zip(responses, images, strict=False):
            assert name == "logits"
            np.testing.assert_array_equal(logits, image)


def test_packages_have_the_onnx_runtime_of_the_server() -> None:
    pins = [line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines()]
    (runtime,) = (package for package in TRITON if package.startswith("onnxruntime"))
    assert runtime in pins


def test_installed_packages_if_pip_fails_reports_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no matching distribution\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(peer_packages.sys, "executable", str(python))
    monkeypatch.setenv("LADDERSTITCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PeerError, match=r"could not install nvidia-pytriton(.|\n)*no matching"):
        installed_packages(TRITON)
    assert not list((tmp_path / "cache" / "peers").iterdir())


def test_triton_server_that_ends_reports_its_log(tmp_path: Path) -> None:
    packages = make_packages(tmp_path, "echo the model is broken; exit 3")
    with (
        pytest.raises(PeerError, match=r"ended with status 3:\nthe model is broken"),
        triton_server(packages, tmp_path, "net"),
    ):
        pass


def test_triton_server_without_a_stub_names_the_versions(tmp_path: Path) -> None:
    packages = make_packages(tmp_path, "exit 3")
    stubs = packages / "pytriton" / "tritonserver" / "python_backend_stubs"
    (stubs / PYTHON).rename(stubs / "3.1")
    with (
        pytest.raises(PeerError, match=rf"expected one of Python 3\.1, got {PYTHON}"),
        triton_server(packages, tmp_path, "net"),
    ):
        pass
