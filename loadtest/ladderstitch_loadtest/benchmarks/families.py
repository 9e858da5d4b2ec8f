"""The same networks as a stitched family and as a family without stitches, under the same load.

The networks are the anchors of the embedded family that stitches join, in float32. As a family
without stitches they are ONNX files with their qualities, imported as a user does it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import onnx
import yaml

from ladderstitch.bundles import EMBEDDED
from ladderstitch.client import AsyncClient
from ladderstitch.importers.image_settings import ImageSettings
from ladderstitch.importers.onnx_bundle import import_networks
from ladderstitch.importers.onnx_networks import FamilyInfo
from ladderstitch.vision.bundle import (
    VisionBundle,
    VisionManifest,
    write_manifest,
    write_table,
)
from ladderstitch.vision.models.graphs import cached_units, join_units, unit_paths
from ladderstitch.vision.models.route import Stitch
from ladderstitch_loadtest.benchmarks.mixed import (
    UnloadedLatency,
    budget_classes,
    make_images,
    measure_unloaded,
    rotate,
)
from ladderstitch_loadtest.load import traces
from ladderstitch_loadtest.load.image_load import LoadRun, measure
from ladderstitch_loadtest.load.paired import paired_difference
from ladderstitch_loadtest.load.targets import find_target
from ladderstitch_loadtest.load.traces import BudgetClass, Trace

STITCHED, PLAIN = "stitched", "without-stitches"
BURST_SHARE, BURST_FACTOR = 0.6, 10.0
"""The rate of the burst as a share of what the fastest network can answer, and over the rest's."""


@dataclass(frozen=True, slots=True)
class Families:
    """Both bundles of the same anchors, whose ids are the smallest network's first.

    `floor` is the smallest quality of the anchors and their stitches.
    """

    bundles: Mapping[str, Path]
    anchors: tuple[str, ...]
    anchor_ids: Mapping[str, Sequence[int]]
    floor: float


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """One family under one load, over all rounds; requests that were rejected count as missed.

    `behind` is the stitched family's effective quality minus this one's in points, the mean over
    the rounds, and `behind_half_width` the half width of its 95 % interval.
    """

    load: str
    family: str
    requests: int
    attainment: float
    by_class: dict[str, float]
    effective_quality: float
    lag_p99_ms: float
    behind: float
    behind_half_width: float


@dataclass(frozen=True, slots=True)
class FamiliesResult:
    """The measurement: budgets in ms by class, rates in requests/s by load, a row each.

    `choices` counts the variants that budgets choose from, and `compute_ms` has the median compute
    of each anchor for one caller, by family.
    """

    images: int
    rounds: int
    anchors: tuple[str, ...]
    choices: dict[str, int]
    compute_ms: dict[str, list[float]]
    budgets_ms: dict[str, float]
    rates: dict[str, float]
    rows: list[FamilyRow]

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


def write_families(folder: Path) -> Families:
    """Write both bundles into a folder."""
    embedded = VisionBundle.load(EMBEDDED)
    table = embedded.quality
    assert table is not None, "the embedded bundle is calibrated"
    stitches = [v for v in embedded.manifest.variants() if v.precision == "float32"]
    joined = {s.front for s in stitches if s.layers} | {s.end for s in stitches if s.layers}
    used = [s for s in stitches if {s.front, s.end} <= joined]
    stitched = folder / STITCHED
    shutil.copytree(EMBEDDED, stitched, ignore=shutil.ignore_patterns("int8", "latency.json"))
    fields = embedded.manifest.model_dump(by_alias=True) | {"precisions": ("float32",)}
    write_manifest(stitched, VisionManifest.model_validate(fields))
    kept = {stitch.id: table.variants[stitch.id] for stitch in stitches}
    alone = table.model_copy(update={"variants": kept, "cascades": ()})
    write_table(stitched / "quality.json", alone)
    anchors = [stitch for stitch in used if stitch.is_anchor]
    qualities = {stitch.id: table.value(stitch.id) for stitch in anchors}
    plain = _write_plain(embedded, anchors, qualities, folder)
    floor = min(table.value(stitch.id) for stitch in used)
    return Families(
        {STITCHED: stitched, PLAIN: plain},
        tuple(anchor.name for anchor in anchors),
        {STITCHED: [anchor.id for anchor in anchors], PLAIN: range(len(anchors))},
        floor,
    )


def _write_plain(
    embedded: VisionBundle, anchors: list[Stitch], qualities: Mapping[int, float], folder: Path
) -> Path:
    """Export anchors to ONNX files and import them as a family without stitches."""
    images = embedded.manifest.preprocessing
    shape = (images.channels, images.height, images.width)
    units = cached_units(embedded.digest(), embedded.load_stitched, shape, lambda done, total: None)
    entries: list[dict[str, object]] = []
    for anchor in anchors:
        file = folder / f"anchor-{anchor.front}.onnx"
        onnx.save(join_units(unit_paths(anchor, units, embedded.int8_folder)), file)
        entries.append({"file": file.name, "quality": qualities[anchor.id]})
    (folder / "family.yaml").write_text(yaml.safe_dump({"networks": entries}))
    settings = ImageSettings(mean=tuple(images.mean), std=tuple(images.std))
    info = FamilyInfo(PLAIN, settings=settings)
    import_networks([folder / "family.yaml"], info, folder / PLAIN)
    return folder / PLAIN


async def compare_families(
    addresses: Mapping[str, str],
    families: Families,
    *,
    images: int,
    load: float,
    seconds: float,
    rounds: int,
    advance: Callable[[str], None],
) -> FamiliesResult:
    """Send the same arrivals to both servers in turn: three budgets, and a tenfold burst.

    The rate of the first load is `load` times what the best anchor can answer one by one. `advance`
    gets the name of the current step.
    """
    advance("unloaded latency")
    unloaded: dict[str, list[UnloadedLatency]] = {}
    choices = {}
    for name, address in addresses.items():
        async with AsyncClient(address) as client:
            await client.update_scheduling(min_quality=families.floor)
            model = await client.get_model()
            pixels, quality = make_images(model, images), {v.id: v.quality for v in model.variants}
            choices[name] = sum(quality[variant] >= families.floor for variant in model.frontier)
            unloaded[name] = [
                await measure_unloaded(client, pixels, variant)
                for variant in families.anchor_ids[name]
            ]
    plain = unloaded[PLAIN]
    fastest, middle, best = plain[0], plain[len(plain) // 2], plain[-1]
    classes = budget_classes(fastest, middle, best)
    rates = {
        "budgets": load / best.compute_median_s,
        "burst": BURST_SHARE / fastest.compute_median_s,
    }
    runs: dict[tuple[str, str], list[LoadRun]] = {}
    for turn in range(rounds):
        for trace in draw_traces(classes, rates, seconds, turn):
            for name in rotate(list(addresses), turn):
                advance(f"round {turn + 1} of {rounds}: {trace.name}, {name}")
                target = find_target(addresses[name], "ladderstitch", "", hard=False, images=images)
                run = measure(addresses[name], target, trace)
                runs.setdefault((trace.name, name), []).append(run)
    return FamiliesResult(
        images=images,
        rounds=rounds,
        anchors=families.anchors,
        choices=choices,
        compute_ms={
            name: [round(1e3 * one.compute_median_s, 3) for one in of_anchors]
            for name, of_anchors in unloaded.items()
        },
        budgets_ms={c.name: round(1e3 * c.budget_s, 3) for c in classes},
        rates={name: round(rate, 1) for name, rate in rates.items()},
        rows=[
            summarise(load_name, name, own, runs[load_name, STITCHED])
            for (load_name, name), own in runs.items()
        ],
    )


def draw_traces(
    classes: list[BudgetClass], rates: Mapping[str, float], seconds: float, seed: int
) -> list[Trace]:
    """Return Poisson arrivals with three budgets, and a burst in the middle third with one."""
    rng = np.random.default_rng(seed)
    mixed = traces.poisson(rates["budgets"], seconds, rng)
    base, burst = rates["burst"] / BURST_FACTOR, rates["burst"]
    stepped = traces.step(base, burst, seconds / 3, 2 * seconds / 3, seconds, rng)
    return [
        Trace.draw("budgets", mixed, classes, rng),
        Trace.draw("burst", stepped, classes[-1:], rng),
    ]


def summarise(load: str, family: str, own: list[LoadRun], stitched: list[LoadRun]) -> FamilyRow:
    """Return the figures of one family's runs; run i of both families had the same arrivals."""
    met = np.concatenate([run.outcome.met for run in own])
    picks = np.concatenate([run.outcome.trace.picks for run in own])
    values = [fmean(run.outcome.value) for run in own]
    behind, half_width = paired_difference([fmean(r.outcome.value) for r in stitched], values)
    classes = own[0].outcome.trace.classes
    return FamilyRow(
        load=load,
        family=family,
        requests=len(met),
        attainment=round(float(met.mean()), 4),
        by_class={c.name: round(float(met[picks == n].mean()), 4) for n, c in enumerate(classes)},
        effective_quality=round(fmean(values), 4),
        lag_p99_ms=round(1e3 * max(run.lag_p99_s for run in own), 2),
        behind=round(100 * behind, 3),
        behind_half_width=round(100 * half_width, 3),
    )
