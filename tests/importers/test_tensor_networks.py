"""Bundles of networks that return tensors or take none but tensors: import, `make`, `calibrate`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import Extractor
from PIL import Image
from safetensors.numpy import load_file
from torch import nn
from typer.testing import CliRunner

from ladderstitch.cli import app, console
from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.hosting.answer_limit import AnswerLimit
from ladderstitch.importers.image_settings import WHOLE, ImageSettings
from ladderstitch.importers.onnx_bundle import import_networks, write_family
from ladderstitch.importers.onnx_networks import FamilyInfo, find_sources, load_family
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.training.vision.pairs import fit_maps, list_joints
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.startup import open_executor
from ladderstitch.vision.networks.config import OnnxConfig
from ladderstitch.vision.networks.outputs import split_rows
from tests.support.onnx_networks import write_photographs
from tests.support.tensor_networks import (
    CLASSES,
    IMAGE,
    VIDEO,
    Embedder,
    Pooled,
    Segmenter,
    TwoOutputs,
    Video,
    Wide,
    random_inputs,
    run_file,
    write_tensor_network,
)

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
INFO = FamilyInfo("mine", settings=ImageSettings(labels=CLASSES, crop=WHOLE))


def run(*arguments: str | Path, fails: bool = False) -> str:
    """Run a command of the command line and return what it prints."""
    with mock.patch.object(console.err, "_width", 1000):  # keeps long paths whole
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code == 2) is fails, result.output
    return " ".join(result.output.split())


def served(bundle: VisionBundle, inputs: np.ndarray, variant: int = 0) -> dict[str, np.ndarray]:
    """Return the outputs that a server computes."""
    executor = open_executor(bundle, 1, lambda done, total: None)
    return split_rows(executor(inputs, variant), bundle.manifest.outputs)


def quality_of(folder: Path) -> QualityTable:
    """Return the qualities in a bundle."""
    table = VisionBundle.load(folder).quality
    assert table is not None
    return table


def write_pixels(folder: Path, count: int) -> np.ndarray:
    """Write PNG files of 16 x 16 random pixels, and return their inputs [N, 3, 16, 16]."""
    folder.mkdir()
    pixels = np.random.default_rng(7).integers(0, 256, (count, 16, 16, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)


def two_segmenters(folder: Path) -> list[Path]:
    """Write two segmentation networks, the cheaper one first."""
    return [write_tensor_network(folder / f"{w}.onnx", Segmenter, w) for w in (6, 12)]


def test_outputs_are_matched_by_name_or_by_position(tmp_path: Path) -> None:
    large = write_tensor_network(tmp_path / "large.onnx", TwoOutputs, 8)
    renamed = write_tensor_network(tmp_path / "small.onnx", TwoOutputs, 4, ("a", "b", "c"))
    swapped = onnx.load(write_tensor_network(tmp_path / "other.onnx", TwoOutputs, 6))
    outputs = [onnx.ValueInfoProto.FromString(o.SerializeToString()) for o in swapped.graph.output]
    del swapped.graph.output[:]
    swapped.graph.output.extend(reversed(outputs))
    onnx.save(swapped, tmp_path / "other.onnx")
    paths = [large, renamed, tmp_path / "other.onnx"]
    bundle = import_networks(paths, FamilyInfo("mine"), tmp_path / "bundle")
    assert [output.name for output in bundle.manifest.outputs] == ["maps", "best", "mean"]
    images = random_inputs(3, IMAGE)
    small, other, big = (served(bundle, images, variant) for variant in range(3))
    for got, file in ((other, paths[2]), (big, large)):
        for name, values in run_file(file, images).items():
            np.testing.assert_allclose(got[name], values, atol=1e-4)
    for got_values, values in zip(small.values(), run_file(renamed, images).values(), strict=True):
        np.testing.assert_allclose(got_values, values, atol=1e-4)


def test_vector_is_an_embedding_or_class_scores(tmp_path: Path) -> None:
    path = write_tensor_network(tmp_path / "vector.onnx", Pooled, 8)
    run("import", path, "--into", tmp_path / "scores", "--name", "a")
    run("import", path, "--into", tmp_path / "tensors", "--name", "b", "--outputs", "tensors")
    scores, tensors = (VisionBundle.load(tmp_path / name) for name in ("scores", "tensors"))
    assert (len(scores.manifest.labels), scores.manifest.outputs) == (6, ())
    assert [(o.name, o.shape) for o in tensors.manifest.outputs] == [("vector", (6,))]
    assert tensors.manifest.labels == ()
    named = write_tensor_network(tmp_path / "named.onnx", Pooled, 8, ("pooler_output",))
    run("import", named, "--into", tmp_path / "named", "--name", "c")
    (output,) = VisionBundle.load(tmp_path / "named").manifest.outputs
    assert (output.name, output.kind) == ("pooler_output", "tensor")
    message = run("import", path, "--into", tmp_path / "x", "--outputs", "vectors", fails=True)
    assert "outputs: expected one of ('auto', 'scores', 'tensors'), got vectors" in message


def test_dense_scores_have_labels_if_their_number_fits(tmp_path: Path) -> None:
    path = write_tensor_network(tmp_path / "masks.onnx", Segmenter, 6)
    known = import_networks([path], INFO, tmp_path / "known").manifest
    unknown = import_networks([path], FamilyInfo("b"), tmp_path / "unknown").manifest
    stated = FamilyInfo("c", outputs="scores")
    numbered = import_networks([path], stated, tmp_path / "numbered").manifest
    assert (known.labels, known.outputs[0].kind) == (CLASSES, "scores")
    assert (unknown.labels, unknown.outputs[0].kind) == ((), "tensor")
    assert (numbered.labels[3], numbered.outputs[0].kind) == ("class 3", "scores")


def test_networks_of_other_outputs_are_rejected(tmp_path: Path) -> None:
    masks = write_tensor_network(tmp_path / "masks.onnx", Segmenter, 6)
    tokens = write_tensor_network(tmp_path / "tokens.onnx", Embedder, 6)
    with pytest.raises(ConfigError, match=r"outputs: expected the same .* \[16, 6\]"):
        import_networks([masks, tokens], INFO, tmp_path / "bundle")


def test_output_whose_size_depends_on_the_pixels_is_rejected(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("NonZero", ["x"], ["z"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *IMAGE])
    outputs = [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in (("y", TensorProto.FLOAT), ("z", TensorProto.INT64))
    ]
    graph = helper.make_graph(nodes, "graph", [x], outputs)
    path = tmp_path / "boxes.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    with pytest.raises(BundleError, match="output 'z': expected the batch as the first axis"):
        import_networks([path], FamilyInfo("mine"), tmp_path / "bundle")


def test_open_sizes_of_a_tensor_are_stated(tmp_path: Path) -> None:
    path = write_tensor_network(tmp_path / "video.onnx", Video, 4)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "frames"
    onnx.save(model, path)
    message = run("import", path, "--into", tmp_path / "a", fails=True)
    assert "state them with --input-shape" in message
    run("import", path, "--into", tmp_path / "b", "--input-shape", "3,6,8,8")
    bundle = VisionBundle.load(tmp_path / "b")
    videos = random_inputs(2, (3, 6, 8, 8))
    executor = open_executor(bundle, 1, lambda done, total: None)
    expected = run_file(path, videos)["scores"]
    np.testing.assert_allclose(executor(videos, 0), expected, atol=1e-4)
    message = run("import", path, "--into", tmp_path / "c", "--input-shape", "3,6,8,9", fails=True)
    assert "expected an input [batch, 3, 6, 8, 9]" in message


def test_outputs_beyond_the_largest_message_are_not_loaded(tmp_path: Path) -> None:
    path = write_tensor_network(tmp_path / "wide.onnx", Wide, 1)
    bundle = import_networks([path], FamilyInfo("wide"), tmp_path / "bundle")
    needed = 4 * 8 * 192 * 192
    with pytest.raises(BundleError, match=rf"got {needed}; raise max_message_mb \(1\)"):
        AnswerLimit(1).check_bundle(bundle)
    AnswerLimit(2).check_bundle(bundle)


def check_stitched(bundle: VisionBundle, paths: list[Path], inputs: np.ndarray) -> None:
    """Compare the first stitched path with parts cut by onnx itself, and its map in float64."""
    config, folder = bundle.manifest.config, bundle.path
    assert isinstance(config, OnnxConfig)
    path = config.paths[0]
    leave = config.networks[path.front].cuts[path.leave]
    enter = config.networks[path.end].cuts[path.enter]
    models = [onnx.shape_inference.infer_shapes(onnx.load(file)) for file in paths]
    source = models[0].graph.input[0].name
    targets = [output.name for output in models[0].graph.output]
    front = Extractor(models[path.front]).extract_model([source], [leave])
    end = Extractor(models[path.end]).extract_model([enter], targets)
    onnx.save(front, folder / "front.onnx")
    onnx.save(end, folder / "end.onnx")
    features = run_file(folder / "front.onnx", inputs)[leave].astype(np.float64)
    maps = load_file(folder / "weights.safetensors")
    weight, bias = maps[f"{path.layer}.weight"], maps[f"{path.layer}.bias"]
    mapped = np.moveaxis(np.moveaxis(features, 1, -1) @ weight.T + bias, -1, 1)
    expected = run_file(folder / "end.onnx", mapped.astype(np.float32))
    executor = open_executor(bundle, 1, lambda done, total: None)
    got = {targets[0]: executor(inputs, len(config.networks))}
    if bundle.manifest.outputs:
        got = split_rows(got[targets[0]], bundle.manifest.outputs)
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, atol=1e-4)


def test_made_family_of_segmenters_is_stitched(tmp_path: Path) -> None:
    paths = two_segmenters(tmp_path)
    photos = write_photographs(tmp_path / "photos", 12)
    into = tmp_path / "made"
    options = ["--images", photos, "--paths", "3", "--rounds", "2", "--into"]
    printed = run("make", *paths, "--name", "masks", *options, into)
    assert "ladderstitch serve --model" in printed
    bundle, table = VisionBundle.load(into), quality_of(into)
    assert table.metric == "cosine agreement with 12"
    assert table.value(1) == 1.0
    assert table.n == 3 * 8
    check_stitched(bundle, paths, random_inputs(3, IMAGE))
    labelled = ["make", *paths, "--name", "a", "--labelled", photos, *options, tmp_path / "a"]
    assert "labelled: expected none for networks that" in run(*labelled, fails=True)


def test_cosine_is_that_of_the_outputs(tmp_path: Path) -> None:
    paths = [write_tensor_network(tmp_path / f"{w}.onnx", Embedder, w) for w in (4, 8)]
    import_networks(paths, INFO, tmp_path / "bundle")
    images = write_pixels(tmp_path / "photos", 6)
    run("calibrate", tmp_path / "bundle", "--images", tmp_path / "photos", "--batch-size", "4")
    small, large = (run_file(path, images)["tokens"].reshape(6, -1) for path in paths)
    norms = np.linalg.norm(small, axis=1) * np.linalg.norm(large, axis=1)
    cosines = np.clip((small * large).sum(1) / norms, 0, 1)
    table = quality_of(tmp_path / "bundle")
    assert table.metric == "cosine agreement with 8"
    assert table.value(0) == pytest.approx(cosines.mean(), abs=1e-5)
    assert table.variants[0].low <= table.value(0) <= table.variants[0].high
    assert table.variants[0].low < table.variants[0].high
    assert table.value(1) == pytest.approx(1, abs=1e-6)


def test_mean_iou_is_that_of_the_masks(tmp_path: Path) -> None:
    paths = two_segmenters(tmp_path)
    import_networks(paths, INFO, tmp_path / "bundle")
    images = write_pixels(tmp_path / "photos", 5)
    (tmp_path / "masks").mkdir()
    masks = np.random.default_rng(1).integers(0, 4, (5, 8, 8)).astype(np.uint8)
    masks[0, :2] = 255
    for number, mask in enumerate(masks):
        whole = Image.fromarray(mask.repeat(2, 0).repeat(2, 1))
        whole.save(tmp_path / "masks" / f"{number}.png")
    given = ["--images", tmp_path / "photos", "--targets", tmp_path / "masks"]
    run("calibrate", tmp_path / "bundle", *given, "--metric", "mean-iou", "--batch-size", "2")
    table = quality_of(tmp_path / "bundle")
    assert (table.metric, table.n) == ("mean IoU", 5)
    for variant, path in enumerate(paths):
        predicted = run_file(path, images)["masks"].argmax(1)
        shares = []
        for label in range(4):
            found, wanted = (predicted == label) & (masks != 255), masks == label
            if (found | wanted).any():
                shares.append((found & wanted).sum() / (found | wanted).sum())
        assert table.value(variant) == pytest.approx(np.mean(shares), abs=1e-6)
    rows = [f"photos/{n}.png,masks/{n}.png" for n in range(5)]
    (tmp_path / "val.csv").write_text("\n".join(["path,mask", *rows]))
    run("calibrate", tmp_path / "bundle", "--data", tmp_path / "val.csv", "--metric", "mean-iou")
    assert quality_of(tmp_path / "bundle").variants == table.variants
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(tmp_path / "masks" / "3.png")
    message = run("calibrate", tmp_path / "bundle", *given, "--metric", "mean-iou", fails=True)
    assert "3.png: expected classes 0 to 3, or 255 for none" in message
    (tmp_path / "masks" / "3.png").unlink()
    message = run("calibrate", tmp_path / "bundle", *given, "--metric", "mean-iou", fails=True)
    assert "got none for ['3']" in message


def test_rmse_is_scaled_by_the_deviation_of_the_targets(tmp_path: Path) -> None:
    path = write_tensor_network(tmp_path / "masks.onnx", Segmenter, 6)
    import_networks([path], INFO, tmp_path / "bundle")
    images = write_pixels(tmp_path / "photos", 4)
    targets = random_inputs(4, (4, 8, 8), seed=3) + 1
    rows = []
    for number, target in enumerate(targets):
        np.save(tmp_path / f"{number}.npy", target)
        rows.append(f"photos/{number}.png,{number}.npy")
    (tmp_path / "val.csv").write_text("\n".join(rows))
    run("calibrate", tmp_path / "bundle", "--data", tmp_path / "val.csv", "--metric", "rmse")
    errors = run_file(path, images)["masks"].astype(np.float64) - targets
    expected = 1 / (1 + math.sqrt((errors**2).mean()) / targets.astype(np.float64).std())
    assert quality_of(tmp_path / "bundle").value(0) == pytest.approx(expected, abs=1e-6)
    np.save(tmp_path / "0.npy", np.zeros((4, 8)))
    wrong = ["calibrate", tmp_path / "bundle", "--data", tmp_path / "val.csv", "--metric", "rmse"]
    assert "0.npy: expected [4, 8, 8], got [4, 8]" in run(*wrong, fails=True)


def test_function_of_the_user_is_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tensor_network(tmp_path / "two.onnx", TwoOutputs, 6)
    info = FamilyInfo("two", settings=ImageSettings(crop=WHOLE))
    import_networks([path], info, tmp_path / "bundle")
    images = write_pixels(tmp_path / "photos", 4)
    rows = [f"photos/{n}.png,{n / 10}" for n in range(4)]
    (tmp_path / "val.csv").write_text("\n".join(rows))
    (tmp_path / "own_metric_of_test.py").write_text(
        "def share(outputs, target):\n"
        "    return float((outputs['best'] == 2).mean()) * float(target)\n"
        "def wrong(outputs, target):\n"
        "    return 1.5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ["calibrate", "bundle", "--data", "val.csv", "--metric"]
    run(*command, "own_metric_of_test:share")
    best = run_file(path, images)["best"]
    expected = np.mean([(best[n] == 2).mean() * n / 10 for n in range(4)])
    table = quality_of(tmp_path / "bundle")
    assert table.metric == "own_metric_of_test:share"
    assert table.value(0) == pytest.approx(expected, abs=1e-6)
    assert "expected 0 to 1 from" in run(*command, "own_metric_of_test:wrong", fails=True)
    assert "metric: expected module:function" in run(*command, "own_metric_of_test:no", fails=True)
    assert "metric: expected one of ('accuracy'" in run(*command, "iou", fails=True)
    assert "expected another one for outputs that are" in run(*command, "accuracy", fails=True)
    assert "expected one output of scores" in run(*command, "mean-iou", fails=True)
    del sys.modules["own_metric_of_test"]


def test_videos_are_calibrated_and_made(tmp_path: Path) -> None:
    paths = [write_tensor_network(tmp_path / f"{w}.onnx", Video, w) for w in (4, 8)]
    videos = random_inputs(12, VIDEO)
    (tmp_path / "videos").mkdir()
    large = run_file(paths[1], videos)["scores"].argmax(1)
    small = run_file(paths[0], videos)["scores"].argmax(1)
    rows = []
    for number, video in enumerate(videos):
        np.save(tmp_path / "videos" / f"{number:02d}.npy", video)
        rows.append(f"videos/{number:02d}.npy,{CLASSES[large[number]]}")
    (tmp_path / "val.csv").write_text("\n".join(rows))
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    labels = ["--labels", tmp_path / "labels.txt"]
    into = tmp_path / "plain"
    run("import", *paths, "--into", into, *labels)
    for data, metric in (
        (["--data", tmp_path / "val.csv"], "top-1 accuracy"),
        (["--images", tmp_path / "videos"], "agreement with 8"),
    ):
        run("calibrate", into, *data)
        table = quality_of(into)
        assert (table.metric, table.n, table.value(1)) == (metric, 12, 1.0)
        assert table.value(0) == pytest.approx((small == large).mean())
        assert 0 < table.variants[1].low < 1
    made = ["--images", tmp_path / "videos", "--rounds", "2", "--into", tmp_path / "made"]
    run("make", *paths, "--name", "video", *labels, *made)
    bundle = VisionBundle.load(tmp_path / "made")
    assert [variant.name for variant in bundle.manifest.variants()][:2] == ["4", "8"]
    assert bundle.latency is not None
    np.save(tmp_path / "videos" / "00.npy", videos[0, :, :2])
    message = run("calibrate", into, "--images", tmp_path / "videos", fails=True)
    assert "00.npy: expected [3, 4, 8, 8], got [3, 2, 8, 8]" in message


@pytest.mark.parametrize(("kind", "shape"), [(Video, VIDEO), (TwoOutputs, IMAGE)])
def test_stitched_path_equals_its_parts(
    kind: type[nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    paths = [write_tensor_network(tmp_path / f"{w}.onnx", kind, w) for w in (4, 8)]
    family = load_family(find_sources(paths), INFO)
    joints = list_joints(family.networks)[:1]
    maps = fit_maps(joints, family.networks, family.scalings, [random_inputs(8, shape, 1)])
    bundle = write_family(family, tmp_path / "bundle", joints, maps)
    check_stitched(bundle, paths, random_inputs(3, shape))


def test_integers_beyond_float32_are_an_error(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.asarray([1 << 26], np.int64), "big")
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Add", ["whole", "big"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *IMAGE])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, None)
    graph = helper.make_graph(nodes, "graph", [x], [y], [weight])
    path = tmp_path / "big.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    bundle = import_networks([path], FamilyInfo("big"), tmp_path / "bundle")
    with pytest.raises(Exception, match="y: expected integers below 16777216"):
        served(bundle, random_inputs(1, IMAGE))
