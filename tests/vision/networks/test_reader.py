"""Tests of hostile ONNX files: each is rejected by name, and nothing of it is run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ladderstitch.errors import BundleError
from ladderstitch.vision.networks.reader import read_network
from ladderstitch.vision.networks.units import Network
from tests.support.onnx_networks import SHAPE, random_images, reference, run, write_network

OPSETS = [helper.make_opsetid("", 17)]


def model_of(
    nodes: list[onnx.NodeProto],
    weights: list[TensorProto] | None = None,
    *,
    functions: list[onnx.FunctionProto] | None = None,
    opsets: list[onnx.OperatorSetIdProto] | None = None,
) -> onnx.ModelProto:
    """Return a model from images `x` to scores `y`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], weights or [])
    return helper.make_model(
        graph, opset_imports=opsets or OPSETS, ir_version=9, functions=functions or []
    )


def constant(name: str, values: list[int]) -> TensorProto:
    """Return a weight of integers."""
    return numpy_helper.from_array(np.asarray(values, np.int64), name)


def external(location: str, offset: str = "0", length: str | None = None) -> TensorProto:
    """Return a weight of 5 numbers whose data are in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[5])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def external_model(*place: str) -> onnx.ModelProto:
    """Return a model that adds an external weight."""
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], [external(*place)])


def cycle() -> onnx.ModelProto:
    """Return a model of two operators that wait for each other."""
    edges = [("Add", ["x", "b"], "a"), ("Relu", ["a"], "b"), ("Relu", ["a"], "y")]
    return model_of([helper.make_node(name, inputs, [out]) for name, inputs, out in edges])


def wrong_size() -> onnx.ModelProto:
    """Return a model with a weight of a trillion numbers that has 8 bytes."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 20])
    tensor.raw_data = bytes(8)
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def short_weight() -> onnx.ModelProto:
    """Return a model with a weight that lacks its last number."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[5], raw_data=bytes(16))
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def negative_shape() -> onnx.ModelProto:
    """Return a model with a weight of -5 numbers."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-5], raw_data=bytes(4))
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def function_bomb() -> onnx.ModelProto:
    """Return a model of 30 functions, each of which calls the one before it ten times."""
    opsets = [*OPSETS, helper.make_opsetid("bomb", 1)]
    functions = []
    for level in range(30):
        nodes = [
            helper.make_node(f"f{level - 1}", [f"t{i}"], [f"t{i + 1}"], domain="bomb")
            if level
            else helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"])
            for i in range(10)
        ]
        functions.append(helper.make_function("bomb", f"f{level}", ["t0"], ["t10"], nodes, opsets))
    call = helper.make_node("f29", ["x"], ["y"], domain="bomb")
    return model_of([call], functions=functions, opsets=opsets)


def recursion() -> onnx.ModelProto:
    """Return a model with a function that calls itself."""
    opsets = [*OPSETS, helper.make_opsetid("bomb", 1)]
    node = helper.make_node("f", ["a"], ["b"], domain="bomb")
    function = helper.make_function("bomb", "f", ["a"], ["b"], [node], opsets)
    call = helper.make_node("f", ["x"], ["y"], domain="bomb")
    return model_of([call], functions=[function], opsets=opsets)


HOSTILE: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "cycle": (cycle, "without cycles, got a cycle"),
    "self-loop": (
        lambda: model_of([helper.make_node("Add", ["x", "y"], ["y"])]),
        "without cycles, got a cycle",
    ),
    "two writers": (
        lambda: model_of([helper.make_node("Relu", ["x"], ["y"])] * 2),
        "expected one writer of tensor 'y', got two",
    ),
    "no writer": (
        lambda: model_of([helper.make_node("Add", ["x", "ghost"], ["y"])]),
        "no operator writes tensor 'ghost'",
    ),
    "no output": (
        lambda: model_of([helper.make_node("Relu", ["x"], ["z"])]),
        "no operator writes output 'y'",
    ),
    "outside": (lambda: external_model("../secret"), "expected data in the model's folder"),
    "absolute": (lambda: external_model("/etc/passwd"), "expected data in the model's folder"),
    "link": (lambda: external_model("link"), "expected data in the model's folder"),
    "inner folder": (lambda: external_model("a/../../secret"), "data in the model's folder"),
    "no location": (lambda: external_model(""), "expected data in the model's folder"),
    "missing data": (lambda: external_model("absent.bin"), "No such file"),
    "short data": (lambda: external_model("data.bin", "16"), "expected 20 bytes at 16"),
    "negative offset": (lambda: external_model("data.bin", "-4"), "expected 20 bytes at -4"),
    "long range": (lambda: external_model("data.bin", "0", "99999"), "a range of 99999"),
    "bad number": (lambda: external_model("data.bin", "zero"), "invalid literal"),
    "pipe": (lambda: external_model("pipe"), "expected 20 bytes"),
    "wrong size": (wrong_size, "expected at most .* bytes in all"),
    "short weight": (short_weight, "expected 5 numbers, got 16 bytes"),
    "negative shape": (negative_shape, r"expected a shape, got \[-5\]"),
    "functions": (function_bomb, "expected at most 100000 nodes"),
    "recursion": (recursion, "expected functions without recursion, got 'f'"),
    "custom operator": (
        lambda: model_of(
            [helper.make_node("Run", ["x"], ["y"], domain="evil")],
            opsets=[*OPSETS, helper.make_opsetid("evil", 1)],
        ),
        "expected operators of ONNX Runtime, got 'Run' of 'evil'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_model_is_rejected(case: str, tmp_path: Path) -> None:
    make, message = HOSTILE[case]
    (tmp_path / "secret").write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "data.bin").write_bytes(bytes(24))
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    path = folder / "model.onnx"
    path.write_bytes(make().SerializeToString())
    with pytest.raises(BundleError, match=message):
        read_network(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a file without operators"),
        (b"PK\x03\x04 a zip file of torch", "expected an ONNX model"),
        (b"\x80\x02}q\x00.", "expected an ONNX model"),
        (bytes(range(256)) * 64, "expected an ONNX model"),
        (onnx.ModelProto(ir_version=9).SerializeToString(), "a file without operators"),
    ],
)
def test_other_file_is_rejected(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=message):
        read_network(path)


@pytest.mark.parametrize("place", ["folder", "missing", "pipe"])
def test_path_that_is_no_file_is_rejected(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError):
        read_network(tmp_path / place)


ABSURD = {
    "fill behind a cast": [
        helper.make_node("Cast", ["big"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["real"], ["whole"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["whole"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ],
    "fill behind a product": [
        helper.make_node("ReduceProd", ["big"], ["product"]),
        helper.make_node("ConstantOfShape", ["product"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ],
    "expand by the batch": [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Exp", ["real"], ["grown"]),
        helper.make_node("Cast", ["grown"], ["whole"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["whole"], ["c"]),
        helper.make_node("ReduceSum", ["c"], ["sum"]),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ],
    "expand": [helper.make_node("Expand", ["x", "big"], ["y"])],
    "fill": [
        helper.make_node("ConstantOfShape", ["big"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ],
    "tile": [
        helper.make_node("Unsqueeze", ["x", "first"], ["z"]),
        helper.make_node("Tile", ["z", "big"], ["y"]),
    ],
    "fill behind a sum": [
        helper.make_node("Add", ["big", "big"], ["sum"]),
        helper.make_node("ConstantOfShape", ["sum"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ],
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_shape_is_rejected_before_it_is_run(case: str, tmp_path: Path) -> None:
    path = tmp_path / "absurd.onnx"
    model = model_of(
        ABSURD[case], [constant("big", [1 << 20, 2, 3, 32, 32]), constant("first", [0])]
    )
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"expected at most .* elements"):
        Network(path, SHAPE)


def test_absurd_declared_input_is_rejected(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])])
    for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]:
        dim.dim_value = 1 << 20
    path = tmp_path / "absurd.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="tensor 'x': expected at most"):
        read_network(path)


def test_external_data_in_the_folder_is_read(tmp_path: Path) -> None:
    path = write_network(tmp_path, "resnet", 8)
    images = random_images(2)
    expected = reference(path, images)
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location="data.bin", size_threshold=0
    )
    network = Network(path, SHAPE)
    np.testing.assert_allclose(run(network.unit(None, None, None), images), expected, atol=1e-5)
    assert not any(tensor.external_data for tensor in network.model.graph.initializer)


def test_functions_of_newer_exporters_are_inlined(tmp_path: Path) -> None:
    opsets = [*OPSETS, helper.make_opsetid("pkg.torch", 1)]
    nodes = [helper.make_node("Relu", ["a"], ["c"]), helper.make_node("Neg", ["c"], ["b"])]
    function = helper.make_function("pkg.torch", "layer", ["a"], ["b"], nodes, OPSETS)
    calls = [helper.make_node("layer", ["x"], ["z"], domain="pkg.torch")]
    calls.append(helper.make_node("layer", ["z"], ["y"], domain="pkg.torch"))
    path = tmp_path / "functions.onnx"
    model = model_of(calls, functions=[function], opsets=opsets)
    path.write_bytes(model.SerializeToString())
    assert [node.op_type for node in read_network(path).graph.node] == ["Relu", "Neg"] * 2


def test_network_that_needs_one_batch_size_is_rejected(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    path = tmp_path / "fixed.onnx"
    model = model_of(nodes, [constant("shape", [1, 3072])])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="export it with a dynamic batch axis"):
        Network(path, SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("two inputs", "expected one input, got 2: x, other"),
        ("half precision", "expected a float32 input, got FLOAT16"),
        ("volume", r"expected an input \[batch, 3, 32, 32\], got \[0, 3, 32, 32, 8\]"),
        ("constant output", "output 'z': expected a tensor that the network computes"),
        ("sum over the batch", "output 'z': expected the batch as the first axis"),
    ],
)
def test_network_of_other_interface_is_rejected(change: str, message: str, tmp_path: Path) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])])
    graph = model.graph
    if change == "two inputs":
        other = helper.make_tensor_value_info("other", TensorProto.FLOAT, ["batch", *SHAPE])
        graph.input.append(other)
    elif change == "half precision":
        graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    elif change == "volume":
        graph.input[0].type.tensor_type.shape.dim.add().dim_value = 8
    else:
        reads = "weight" if change == "constant output" else "x"
        graph.initializer.append(constant("weight", [1, 2]))
        operator = "Neg" if change == "constant output" else "ReduceSum"
        graph.node.append(helper.make_node(operator, [reads], ["z"]))
        graph.output.add().name = "z"
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=message):
        Network(path, SHAPE)
