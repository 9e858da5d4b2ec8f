"""The enumeration of stitches against the published counts and the reference's own id lists."""

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
def test_published_counts_at_depth_12(
    kernel_size: int, stride: int, stitches: int, layers: int
) -> None:
    windows = paired_windows(12, kernel_size, stride)
    assert (sum(map(len, windows)), len(windows)) == (stitches, layers)


@pytest.mark.parametrize("case", golden_cases("snnet-deit"), ids=lambda p: p.stem)
def test_routes_equal_the_reference_id_list(case: Path) -> None:
    sheet = json.loads(case.with_suffix(".json").read_text())
    if "ids" not in sheet:
        pytest.skip("a least-squares case lists no ids")
    stitches = read_config("snnet-deit", sheet["config"]).stitches()
    depth = sheet["config"]["anchors"][0]["depth"]
    assert len(stitches) == len(sheet["ids"])
    for stitch, wanted in zip(stitches, sheet["ids"], strict=True):
        assert stitch.id == wanted["id"]
        if wanted["kind"] == "anchor":
            assert stitch.segments == (Segment(wanted["anchor"], 0, depth - 1),)
            continue
        assert stitch.segments == (
            Segment(wanted["front_anchor"], 0, wanted["last_front_block"]),
            Segment(wanted["end_anchor"], wanted["first_end_block"], depth - 1),
        )
        assert stitch.layers == (wanted["stitch_key"],)


def test_any_two_anchors_may_be_stitched() -> None:
    assert anchor_pairs(3, nearest_only=True) == [(0, 1), (1, 2)]
    assert anchor_pairs(3, nearest_only=False) == [(0, 1), (0, 2), (1, 2)]
    ids = enumerate_stitches(anchors=3, depth=12, kernel_size=2, stride=1, nearest_only=False)
    assert len(ids) == 3 + 3 * 34


def test_names_are_unique_and_readable() -> None:
    names = [stitch.name for stitch in tiny_config().stitches()]
    assert len(set(names)) == len(names)
    assert names[0] == "anchor-0"
    assert names[3] == "0[0..0]+1[0..2]"


def test_anchors_of_unequal_depth_are_refused() -> None:
    shallow, deep = tiny_config(3).anchors[0], tiny_config(4).anchors[1]
    with pytest.raises(ValidationError, match=r"one depth, got \[3, 4\]"):
        tiny_config().model_validate(
            tiny_config().model_dump() | {"anchors": [shallow.model_dump(), deep.model_dump()]}
        )


def test_a_route_needs_a_layer_between_segments() -> None:
    with pytest.raises(ValueError, match="one stitching layer between"):
        Stitch(0, (Segment(0, 0, 1), Segment(1, 0, 1)), (), True)
