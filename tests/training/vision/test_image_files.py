"""Tests of the user's data sets: folders, CSV files, labels, splits, and pixels as served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ladderstitch.errors import DataError
from ladderstitch.training.vision.image_files import (
    ImageFiles,
    batches_of_views,
    find_images,
    find_labelled,
    load_labelled,
    load_pixels,
)
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.preprocessing import ImageReader
from tests.support.onnx_networks import write_photographs

INPUTS = Preprocessing(
    channels=3, height=32, width=32, mean=(0.5,) * 3, std=(0.25,) * 3, crop=0.875
)
LABELS = ("cat", "dog", "emu")


def labelled_folder(folder: Path, counts: dict[str, int]) -> Path:
    """Write a folder with one subfolder per class."""
    for seed, (name, count) in enumerate(counts.items()):
        write_photographs(folder / name, count, seed)
    return folder


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("dog", "cat"), [0, 1]),  # names of labels, sorted: cat, dog
        (("2", "0"), [0, 2]),
        (("n03", "n01", "n02"), [0, 1, 2]),
    ],
)
def test_subfolders_are_classes(names: tuple[str, ...], labels: list[int], tmp_path: Path) -> None:
    files = find_labelled(labelled_folder(tmp_path, dict.fromkeys(names, 2)), LABELS)
    assert files.labels is not None
    assert sorted(set(files.labels)) == labels
    assert len(files) == 2 * len(names)


def test_unknown_classes_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels, such as \['cat'.*unknown names such as \['yak'"):
        find_labelled(labelled_folder(tmp_path, {"cat": 1, "yak": 1}), LABELS)


@pytest.mark.parametrize("header", ["path,label\n", ""])
def test_csv_file_holds_paths_and_labels(header: str, tmp_path: Path) -> None:
    write_photographs(tmp_path / "a", 2)
    (tmp_path / "val.csv").write_text(header + "a/0000.png,emu\n\na/0001.png,cat\n")
    files = find_labelled(tmp_path / "val.csv", LABELS)
    assert files.labels == (2, 0)
    assert files.paths == (tmp_path / "a/0000.png", tmp_path / "a/0001.png")
    assert load_labelled(tmp_path / "val.csv", LABELS, INPUTS).pixels.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "expected lines"), ("a.png\n", "got 1 fields in row 1"), ("a.png,yak\n", "yak")],
)
def test_wrong_csv_file_is_rejected(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        find_labelled(tmp_path / "val.csv", LABELS)


def test_missing_and_broken_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        load_pixels(ImageFiles((tmp_path / "gone.png",)), INPUTS)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    files = find_images(tmp_path)
    with pytest.raises(DataError, match=r"broken\.png"):
        load_pixels(files, INPUTS)
    with pytest.raises(DataError, match=r"broken\.png"):
        list(batches_of_views(files, INPUTS, views=1, batch_size=1, seed=0))
    with pytest.raises(DataError, match="expected a folder of images"):
        find_images(tmp_path / "gone")


def class_sorted(counts: tuple[int, ...]) -> ImageFiles:
    """Return files whose classes follow each other."""
    labels = tuple(label for label, count in enumerate(counts) for _ in range(count))
    return ImageFiles(tuple(Path(f"{i}.png") for i in range(len(labels))), labels)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_split_has_the_share_of_every_class(share: float) -> None:
    files = class_sorted((40, 20, 8, 80))
    kept, held_out = files.split(share, seed=3)
    assert sorted((*kept.paths, *held_out.paths)) == sorted(files.paths)
    assert held_out.labels is not None
    for label, count in enumerate((40, 20, 8, 80)):
        assert abs(held_out.labels.count(label) - share * count) < 1
    assert list(held_out.labels) != sorted(held_out.labels)


def test_split_depends_on_the_seed_only() -> None:
    files = class_sorted((10, 10))
    assert files.split(0.3, seed=1) == files.split(0.3, seed=1)
    assert files.split(0.3, seed=1) != files.split(0.3, seed=2)


def test_split_of_few_files_leaves_one_for_each_part() -> None:
    kept, held_out = class_sorted((1, 1)).split(0.01, seed=0)
    assert (len(kept), len(held_out)) == (1, 1)
    unlabelled = ImageFiles(tuple(Path(f"{i}.png") for i in range(3)))
    assert [len(part) for part in unlabelled.split(0.25, seed=0)] == [2, 1]


async def test_pixels_equal_those_of_a_server(tmp_path: Path) -> None:
    files = find_images(write_photographs(tmp_path, 3))
    reader = ImageReader(INPUTS)
    pixels = load_pixels(files, INPUTS)
    for path, image in zip(files.paths, pixels.numpy(), strict=True):
        served = await reader.read_encoded("image", path.read_bytes())
        np.testing.assert_array_equal(reader.normalise(image[None]), served)
    reader.close()


async def test_first_view_is_what_a_server_keeps(tmp_path: Path) -> None:
    files = find_images(write_photographs(tmp_path, 3))
    reader = ImageReader(INPUTS)
    views = list(batches_of_views(files, INPUTS, views=3, batch_size=4, seed=0))
    assert [len(batch) for batch in views] == [4, 4, 1]
    served = await reader.read_encoded("image", files.paths[1].read_bytes())
    np.testing.assert_array_equal(np.concatenate(views)[3], served[0])
    reader.close()
