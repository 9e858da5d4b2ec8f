"""Tests of bundles of ONNX networks: served outputs, families without stitches, rejections."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.progress import Progress

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.image_settings import ImageSettings
from ladderstitch.importers.make_family import MakeOptions, make_family
from ladderstitch.importers.onnx_bundle import import_networks, write_family
from ladderstitch.importers.onnx_networks import FamilyInfo, find_sources, load_family
from ladderstitch.training.vision.calibrate import calibrate_files
from ladderstitch.training.vision.image_files import find_images, load_pixels
from ladderstitch.training.vision.pairs import fit_maps, list_joints
from ladderstitch.training.vision.quantize import quantize
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.startup import make_config, open_executor
from ladderstitch.vision.networks.maps import map_graph
from ladderstitch.vision.networks.units import Network
from ladderstitch.vision.preprocessing import ImageReader
from tests.support.onnx_networks import (
    LABELS,
    SHAPE,
    network_bytes,
    random_images,
    reference,
    run,
    write_network,
    write_photographs,
)

INFO = FamilyInfo("mine", settings=ImageSettings(labels=LABELS))


def served(bundle: VisionBundle, images: np.ndarray, variant: int) -> np.ndarray:
    """Return the scores that a server computes."""
    return open_executor(bundle, 1, lambda done, total: None)(images, variant)


@pytest.mark.parametrize("kind", ["resnet", "vit", "convnext", "swin"])
def test_served_scores_equal_those_of_the_file(kind: str, tmp_path: Path) -> None:
    path = write_network(tmp_path, kind, 8)
    bundle = import_networks([path], INFO, tmp_path / "bundle")
    images = random_images(3)
    np.testing.assert_allclose(served(bundle, images, 0), reference(path, images), atol=1e-4)
    assert bundle.quality is not None
    assert bundle.quality.metric == "unknown (not calibrated)"
    assert bundle.manifest.labels == LABELS


def test_family_file_lists_networks_and_qualities(tmp_path: Path) -> None:
    small, large = (write_network(tmp_path, "convnext", size) for size in (4, 8))
    other = write_network(tmp_path, "resnet", 8)
    entries = [
        {"file": large.name, "name": "large", "quality": 0.9},
        {"file": small.name, "name": "small", "quality": 0.6},
        {"file": other.name, "quality": 0.7},
    ]
    (tmp_path / "family.yaml").write_text(json.dumps({"networks": entries}))
    bundle = import_networks([tmp_path / "family.yaml"], INFO, tmp_path / "bundle")
    variants = bundle.manifest.variants()
    assert bundle.quality is not None
    by_name = {v.name: bundle.quality.variants[v.id].value for v in variants}
    assert by_name == {"large": 0.9, "small": 0.6, "resnet-8": 0.7}
    costs = [sum(entry.macs) for entry in bundle.manifest.config.networks]  # type: ignore[union-attr]
    assert costs == sorted(costs)
    images = random_images(2)
    files = {"large": large, "small": small, "resnet-8": other}
    for variant in variants:
        expected = reference(files[variant.name], images)
        np.testing.assert_allclose(served(bundle, images, variant.id), expected, atol=1e-4)


def test_several_networks_without_qualities_need_calibration(tmp_path: Path) -> None:
    paths = [write_network(tmp_path, "resnet", size) for size in (4, 8)]
    assert import_networks(paths, INFO, tmp_path / "bundle").quality is None


def test_stitched_path_equals_its_parts(tmp_path: Path) -> None:
    paths = [write_network(tmp_path, "swin", 4), write_network(tmp_path, "resnet", 8, opset=13)]
    family = load_family(find_sources(paths), INFO)
    joint = next(j for j in list_joints(family.networks) if j.ends[0].grid != j.ends[1].grid)
    images = random_images(4)
    maps = fit_maps([joint], family.networks, family.scalings, [images])
    bundle = write_family(family, tmp_path / "bundle", [joint], maps)
    front, end = family.networks[joint.front], family.networks[joint.end]
    features = run(front.unit(None, joint.leave.name, None), images)
    mapped = run(map_graph(*maps[0], *joint.ends, front.model), features)
    expected = run(end.unit(joint.enter.name, None, None), mapped)
    executor = open_executor(bundle, 1, lambda done, total: None)
    np.testing.assert_allclose(executor(images, 2), expected, atol=1e-4)
    assert executor.join([0, 2])  # of two versions of operators
    np.testing.assert_allclose(executor(images, 2), expected, atol=1e-4)
    np.testing.assert_allclose(executor.open_whole(2)(images), expected, atol=1e-4)
    for variant, source in enumerate(family.sources):
        whole = reference(source.path, images)
        np.testing.assert_allclose(executor(images, variant), whole, atol=1e-4)


def test_paths_share_the_weights_of_their_networks(tmp_path: Path) -> None:
    paths = [write_network(tmp_path, "convnext", size) for size in (4, 8)]
    family = load_family(find_sources(paths), INFO)
    joints = list_joints(family.networks)[:6]
    maps = fit_maps(joints, family.networks, family.scalings, [random_images(4)])
    bundle = write_family(family, tmp_path / "bundle", joints, maps)
    alone = write_family(family, tmp_path / "alone")
    held = [open_executor(b, 1, lambda done, total: None).weight_bytes for b in (bundle, alone)]
    added = sum(path.stat().st_size for path in [bundle.weights_path])
    assert held[0] < 1.5 * held[1] + 2 * added


def test_networks_of_other_mean_and_std_share_images(tmp_path: Path) -> None:
    small, large = (write_network(tmp_path, "convnext", size) for size in (4, 8))
    for path, mean in ((small, [0.2, 0.3, 0.4]), (large, [0.5, 0.5, 0.5])):
        fields = {"size": {"height": 32, "width": 32}, "image_mean": mean}
        fields["image_std"] = [0.5 * value for value in mean]
        path.with_suffix(".preprocessor_config.json").write_text(json.dumps(fields))
    bundle = import_networks([small, large], INFO, tmp_path / "bundle")
    assert bundle.manifest.preprocessing.mean == (0.5,) * 3
    pixels = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype(np.float32)
    images = (pixels - 0.5) / 0.25
    mean = np.array([0.2, 0.3, 0.4], np.float32).reshape(1, 3, 1, 1)
    expected = reference(small, (pixels - mean) / (0.5 * mean))
    np.testing.assert_allclose(served(bundle, images, 0), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"height": 32, "width": 32}, "resample": 3}, "interpolation: expected the same"),
        ({"size": {"shortest_edge": 32}, "crop_pct": 0.9}, "crop: expected all networks"),
    ],
)
def test_networks_of_other_crops_are_rejected(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    small, large = (write_network(tmp_path, "convnext", size) for size in (4, 8))
    first = {"size": {"height": 32, "width": 32}}
    for path, own in ((small, first), (large, fields)):
        path.with_suffix(".preprocessor_config.json").write_text(json.dumps(own))
    with pytest.raises(ConfigError, match=message):
        import_networks([small, large], INFO, tmp_path / "bundle")


def test_wrong_number_of_labels_is_rejected(tmp_path: Path) -> None:
    info = FamilyInfo("mine", settings=ImageSettings(labels=("one", "two")))
    with pytest.raises(ConfigError, match="labels: expected 5 from the network, got 2"):
        import_networks([write_network(tmp_path, "resnet", 8)], info, tmp_path / "bundle")


def dynamic_network(path: Path, most: float) -> Path:
    """Write a network with dynamic quantisation of pixels that are clipped to [0, `most`]."""
    size = int(np.prod(SHAPE))
    weights = np.random.default_rng(0).integers(-127, 128, (size, len(LABELS)))
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Clip", ["flat", "least", "most"], ["clipped"]),
        helper.make_node("DynamicQuantizeLinear", ["clipped"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["product"]),
        helper.make_node("Cast", ["product"], ["sum"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sum", "scale"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(weights.astype(np.int8), "w"),
        numpy_helper.from_array(np.float32(0), "least"),
        numpy_helper.from_array(np.float32(most), "most"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", len(LABELS)])
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("most", "neighbour"), [(1e30, "in a batch and alone"), (0.5, "next to one of NaN")]
)
def test_network_whose_images_influence_each_other_is_rejected(
    most: float, neighbour: str, tmp_path: Path
) -> None:
    path = dynamic_network(tmp_path / "dynamic.onnx", most)
    with pytest.raises(BundleError, match=f"{neighbour}.*quantise it with static ranges"):
        import_networks([path], INFO, tmp_path / "bundle")


def test_dense_output_is_served_in_a_row(tmp_path: Path) -> None:
    model = onnx.load_from_string(network_bytes("resnet", 8))
    cut = Network(write_network(tmp_path, "resnet", 8), SHAPE).info.cuts[4]
    del model.graph.output[:]
    model.graph.output.add().name = cut.name
    path = tmp_path / "dense.onnx"
    onnx.save(model, path)
    bundle = import_networks([path], FamilyInfo("mine"), tmp_path / "bundle")
    (output,) = bundle.manifest.outputs
    assert (output.name, output.shape, output.kind) == (cut.name, cut.shape, "tensor")
    images = random_images(2)
    expected = reference(path, images).reshape(2, -1)
    np.testing.assert_allclose(served(bundle, images, 0), expected, atol=1e-4)


def test_file_changed_after_import_is_rejected(tmp_path: Path) -> None:
    bundle = import_networks([write_network(tmp_path, "resnet", 8)], INFO, tmp_path / "bundle")
    (bundle.path / "networks" / "resnet-8.onnx").write_bytes(b"not a network")
    with pytest.raises(BundleError, match="expected an ONNX model"):
        served(bundle, random_images(1), 0)
    (bundle.path / "networks" / "resnet-8.onnx").unlink()
    with pytest.raises(BundleError, match="No such file"):
        served(bundle, random_images(1), 0)


def test_what_needs_torch_modules_is_rejected(tmp_path: Path) -> None:
    bundle = import_networks([write_network(tmp_path, "resnet", 8)], INFO, tmp_path / "bundle")
    with pytest.raises(BundleError, match="torch modules, got onnx"):
        bundle.load_model()
    with pytest.raises(BundleError, match="torch modules, got onnx"):
        quantize(bundle, random_images(2), lambda done, total: None)
    options = {"runtime": "auto", "device": "auto", "dtype": "auto"}
    for field, value in (("runtime", "torch"), ("device", "cuda"), ("dtype", "bfloat16")):
        with pytest.raises(ConfigError, match=f"{field}: expected .* for ONNX networks"):
            make_config(bundle, **(options | {field: value}), threads=1, max_batch_size=4)
    assert make_config(bundle, **options, threads=1, max_batch_size=4).runtime == "onnx"


def test_calibration_measures_agreement_or_accuracy(tmp_path: Path) -> None:
    paths = [write_network(tmp_path, "convnext", size) for size in (4, 8)]
    bundle = import_networks(paths, INFO, tmp_path / "bundle")
    photos = write_photographs(tmp_path / "photos", 6)
    with Progress(disable=True) as progress:
        table = calibrate_files(bundle, None, photos, "t10k", None, 4, progress)
        assert (table.metric, table.n, table.value(1)) == ("agreement with convnext-8", 6, 1.0)
        pixels = load_pixels(find_images(photos), bundle.manifest.preprocessing)
        images = ImageReader(bundle.manifest.preprocessing).normalise(pixels.numpy())
        classes = served(bundle, images, 0).argmax(1)
        rows = [f"photos/{i:04d}.png,{LABELS[label]}" for i, label in enumerate(classes)]
        (tmp_path / "val.csv").write_text("\n".join(rows))
        loaded = VisionBundle.load(bundle.path)
        table = calibrate_files(loaded, tmp_path / "val.csv", None, "t10k", None, 4, progress)
        assert (table.metric, table.n, table.value(0)) == ("top-1 accuracy", 6, 1.0)
        with pytest.raises(ConfigError, match="data: expected labelled images"):
            calibrate_files(loaded, None, None, "t10k", None, 4, progress)


@pytest.mark.parametrize("seed", [0, 5])
def test_make_is_deterministic(seed: int, tmp_path: Path) -> None:
    paths = [write_network(tmp_path, "convnext", size) for size in (4, 8)]
    options = MakeOptions(write_photographs(tmp_path / "photos", 12), None, 3, seed)
    made = []
    for number in range(2):
        into = tmp_path / str(number)
        with Progress(disable=True) as progress:
            made.append(make_family(paths, INFO, options, into, progress))
    tables = [bundle.quality for bundle in made]
    assert tables[0] is not None
    assert tables[0] == tables[1]
    assert tables[0].metric == "agreement with convnext-8"
    assert tables[0].value(1) == 1.0
    assert made[0].manifest == made[1].manifest
    assert tables[0].n == 3 * 8  # views of the images that no map was fitted on
