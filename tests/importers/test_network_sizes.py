"""Networks of one family with sizes and crops of their own, against Pillow's resizing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.image_settings import ImageSettings
from ladderstitch.importers.onnx_bundle import import_networks, write_family
from ladderstitch.importers.onnx_networks import FamilyInfo, find_sources, load_family
from ladderstitch.training.vision.pairs import fit_maps, list_joints
from ladderstitch.vision.engine.startup import open_executor
from ladderstitch.vision.networks.maps import map_graph
from ladderstitch.vision.networks.scaling import Scaling, scaling_between
from tests.support.onnx_networks import KINDS, LABELS, export, random_images, reference, run

INFO = FamilyInfo("mine", settings=ImageSettings(labels=LABELS))


def write_sized(folder: Path, width: int, side: int, *, opset: int = 18, **fields: object) -> Path:
    """Write a network for images of one size, with the settings of a processor next to it."""
    path = folder / f"net-{width}.onnx"
    torch.manual_seed(width)
    path.write_bytes(export(KINDS["convnext"](width), (3, side, side), opset=opset))
    if fields:
        path.with_suffix(".preprocessor_config.json").write_text(json.dumps(fields))
    return path


def resized(images: np.ndarray, side: int, resize: str) -> np.ndarray:
    """Return images [B, C, H, W] that Pillow has resized, in float32."""
    method = Image.Resampling[resize.upper()]
    found = [[Image.fromarray(c).resize((side, side), method) for c in i] for i in images]
    return np.array([[np.asarray(channel) for channel in image] for image in found])


@pytest.mark.parametrize("resample", [2, 3])
def test_network_of_another_size_gets_what_pillow_makes(resample: int, tmp_path: Path) -> None:
    resize = {2: "bilinear", 3: "bicubic"}[resample]
    options = {"resample": resample, "size": {"height": 48, "width": 48}}
    small = write_sized(tmp_path, 4, 20, **(options | {"size": {"height": 20, "width": 20}}))
    large = write_sized(tmp_path, 8, 48, **options)
    bundle = import_networks([small, large], INFO, tmp_path / "bundle")
    assert bundle.manifest.preprocessing.height == 48
    images = random_images(3, shape=(3, 48, 48))
    executor = open_executor(bundle, 1, lambda done, total: None)
    variants = {v.name: v.id for v in bundle.manifest.variants()}
    np.testing.assert_allclose(
        executor(images, variants["net-8"]), reference(large, images), atol=1e-4
    )
    expected = reference(small, resized(images, 20, resize))
    np.testing.assert_allclose(executor(images, variants["net-4"]), expected, atol=1e-4)


def test_every_network_keeps_its_own_crop(tmp_path: Path) -> None:
    small = write_sized(tmp_path, 4, 32, size={"shortest_edge": 40}, crop_size=32)  # 0.8
    large = write_sized(tmp_path, 8, 48, size={"shortest_edge": 50}, crop_size=48)  # 0.96
    bundle = import_networks([small, large], INFO, tmp_path / "bundle")
    inputs = bundle.manifest.preprocessing
    assert (inputs.crop, inputs.height) == (0.96, 48)
    images = random_images(2, shape=(3, 48, 48))
    executor = open_executor(bundle, 1, lambda done, total: None)
    variants = {v.name: v.id for v in bundle.manifest.variants()}
    kept = np.ascontiguousarray(images[..., 4:44, 4:44])  # 0.8 / 0.96 of 48 pixels
    expected = reference(small, resized(kept, 32, "bilinear"))
    np.testing.assert_allclose(executor(images, variants["net-4"]), expected, atol=1e-4)
    np.testing.assert_allclose(
        executor(images, variants["net-8"]), reference(large, images), atol=1e-4
    )


def test_images_are_as_large_as_the_finest_network_needs(tmp_path: Path) -> None:
    whole = write_sized(tmp_path, 4, 32, size={"shortest_edge": 32}, crop_size=32)  # 1.0
    inner = write_sized(tmp_path, 8, 32, size={"shortest_edge": 64}, crop_size=32)  # 0.5
    family = load_family(find_sources([whole, inner]), INFO)
    inputs = family.preprocessing
    assert inputs is not None
    assert (inputs.crop, inputs.height, inputs.width) == (1.0, 64, 64)
    by_name = dict(zip([s.name for s in family.sources], family.scalings, strict=True))
    assert by_name["net-4"] == Scaling(size=(32, 32))
    assert by_name["net-8"] == Scaling(box=(16, 16, 48, 48))


def test_stitched_path_starts_with_the_size_of_its_front(tmp_path: Path) -> None:
    paths = [write_sized(tmp_path, 4, 32), write_sized(tmp_path, 8, 48)]
    family = load_family(find_sources(paths), INFO)
    joint = list_joints(family.networks)[0]
    images = random_images(6, shape=(3, 48, 48))
    maps = fit_maps([joint], family.networks, family.scalings, [images])
    bundle = write_family(family, tmp_path / "bundle", [joint], maps)
    front, end = family.networks[joint.front], family.networks[joint.end]
    features = run(front.unit(None, joint.leave.name, None), resized(images, 32, "bicubic"))
    mapped = run(map_graph(*maps[0], *joint.ends, front.model), features)
    expected = run(end.unit(joint.enter.name, None, None), mapped)
    executor = open_executor(bundle, 1, lambda done, total: None)
    np.testing.assert_allclose(executor(images, 2), expected, atol=1e-4)
    assert executor.join([0, 2])
    np.testing.assert_allclose(executor(images, 2), expected, atol=1e-4)


def test_older_operators_resize_without_averaging(tmp_path: Path) -> None:
    options = {"resample": 2}
    small = write_sized(tmp_path, 4, 20, opset=13, **options, size={"height": 20, "width": 20})
    large = write_sized(tmp_path, 8, 48, opset=13, **options, size={"height": 48, "width": 48})
    bundle = import_networks([small, large], INFO, tmp_path / "bundle")
    images = random_images(2, shape=(3, 48, 48))
    expected = F.interpolate(torch.from_numpy(images), (20, 20), mode="bilinear").numpy()
    variants = {v.name: v.id for v in bundle.manifest.variants()}
    got = open_executor(bundle, 1, lambda done, total: None)(images, variants["net-4"])
    np.testing.assert_allclose(got, reference(small, expected), atol=1e-4)


def test_crops_that_cannot_be_expressed_are_refused(tmp_path: Path) -> None:
    paths = [
        write_sized(tmp_path, 4, 32, size={"height": 32, "width": 32}),
        write_sized(tmp_path, 8, 48),
        write_sized(tmp_path, 12, 48, size={"shortest_edge": 60}, crop_size=48),
    ]
    with pytest.raises(ConfigError, match="crop: expected all networks to stretch images"):
        load_family(find_sources(paths), INFO)


def test_too_old_operators_are_refused() -> None:
    with pytest.raises(BundleError, match="operators of version 11 or newer"):
        Scaling(size=(2, 2)).nodes("x", "y", 9)


def test_equal_images_need_no_change() -> None:
    same = ((0.5,), (0.2,))
    assert scaling_between(same, same, sizes=((48, 32), (48, 32))) is None
