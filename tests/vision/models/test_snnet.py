"""Tests of the enumeration of stitches against published counts and the reference's id lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from ladderstitch.importers.stitched_families import read_config
from ladderstitch.vision.models.route import Segment, Stitch
from ladderstitch.vision.models.snnet import anchor_pairs, enumerate_stitches, paired_windows
from tests.conftest import golden_cases, tiny_config


@pytest.mark.parametrize(
    ("kernel_size", "stride", "stitches", "layers"),
    [(2, 1, 34, 11), (1, 1, 12, 12), (2, 2, 24, 6), (3, 1, 54, 10), (4, 4, 48, 3)],
)
def test_paired_windows_depth_12_has_published_counts(
    kernel_size: int, stride: int, stitches: int, layers: int
) -> None:
    windows = paired_windows(12, kernel_size, stride)
    assert (sum(map(len, windows)), len(windows)) == (stitches, layers)


@pytest.mark.parametrize("case", golden_cases("snnet-deit"), ids=lambda p: p.stem)
def test_stitches_equal_reference_id_list(case: Path) -> None:
    sheet = json.loads(case.with_suffix(".json").read_text())
    if "ids" not in sheet:
        pytest.skip("a least-squares case has no id list")
    stitches = read_config("snnet-deit", sheet["config"]).stitches()
    depth = sheet["config"]["anchors"][0]["depth"]
    assert len(stitches) == len(sheet["ids"])
    for stitch, expected in zip(stitches, sheet["ids"], strict=True):
        assert stitch.id == expected["id"]
        if expected["kind"] == "anchor":
            assert stitch.segments == (Segment(expected["anchor"], 0, depth - 1),)
            continue
        assert stitch.segments == (
            Segment(expected["front_anchor"], 0, expected["last_front_block"]),
            Segment(expected["end_anchor"], expected["first_end_block"], depth - 1),
        )
        assert stitch.layers == (expected["stitch_key"],)


def test_anchor_pairs_not_nearest_only_has_all_pairs() -> None:
    assert anchor_pairs(3, nearest_only=True) == [(0, 1), (1, 2)]
    assert anchor_pairs(3, nearest_only=False) == [(0, 1), (0, 2), (1, 2)]
    ids = enumerate_stitches(anchors=3, depth=12, kernel_size=2, stride=1, nearest_only=False)
    assert len(ids) == 3 + 3 * 34


def test_stitch_names_are_unique() -> None:
    names = [stitch.name for stitch in tiny_config().stitches()]
    assert len(set(names)) == len(names)
    assert names[0] == "anchor-0"
    assert names[3] == "0[0..0]+1[0..2]"


def test_snnet_config_unequal_depths_raises() -> None:
    shallow, deep = tiny_config(3).anchors[0], tiny_config(4).anchors[1]
    with pytest.raises(ValidationError, match=r"one depth, got \[3, 4\]"):
        tiny_config().model_validate(
            tiny_config().model_dump() | {"anchors": [shallow.model_dump(), deep.model_dump()]}
        )


def test_stitch_without_layer_between_segments_raises() -> None:
    with pytest.raises(ValueError, match="one stitching layer between"):
        Stitch(0, (Segment(0, 0, 1), Segment(1, 0, 1)), (), True)
