"""One call from model files and pictures to a measured bundle: stitch, select, measure."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from ladderstitch.errors import ConfigError
from ladderstitch.importers.onnx_bundle import Map, write_family
from ladderstitch.importers.onnx_networks import (
    FamilyInfo,
    LoadedFamily,
    find_sources,
    load_family,
)
from ladderstitch.scheduling.profiles import QualityTable, frontier
from ladderstitch.training.vision.calibrate import calibrate, calibrate_agreement
from ladderstitch.training.vision.image_files import (
    ImageFiles,
    find_labelled,
    load_pixels,
    load_views,
    read_labelled,
)
from ladderstitch.training.vision.inputs import InputKind
from ladderstitch.training.vision.measure_metric import measure, relative_metric
from ladderstitch.training.vision.pairs import (
    Joint,
    best_joints,
    compare,
    fit_maps,
    list_joints,
)
from ladderstitch.vision.bundle import VisionBundle, write_table

MAX_COMPARED_IMAGES = 96
"""Images on which the features of all pairs of cuts are compared."""
MIN_VIEWS = 768
"""Views that maps are fitted on: several random squares of each image if there are fewer images."""
MIN_MEASURED = 200
"""Views that agreement is measured on: several random squares of each image of a few."""
MAX_VIEWS_EACH = 8
HELD_OUT = 0.25
"""Share of the unlabelled images that agreement is measured on, and maps are not fitted on."""
FITTED_RATIO = 2
"""Stitched paths that are fitted and measured, as a multiple of those that are kept."""
BATCH = 8


@dataclass(frozen=True, slots=True)
class MakeOptions:
    """The pictures and limits of `make`.

    `labelled` is a folder with one subfolder per class or a CSV file; None measures the agreement
    with the most expensive network instead of accuracy.
    """

    images: Path | None
    labelled: Path | None
    max_paths: int = 12
    seed: int = 0


def make_family(
    paths: Sequence[Path], info: FamilyInfo, options: MakeOptions, into: Path, progress: Progress
) -> VisionBundle:
    """Write the bundle of stitched and calibrated networks, and return it.

    Maps are fitted without labels. Paths that another variant beats in cost and quality are
    dropped. Raises `BundleError`, `ConfigError` or `DataError` that names what does not fit.
    """
    sources = find_sources(paths)
    if options.images is None and options.labelled is None:
        raise ConfigError("images: expected a folder of images or labelled images, got none")
    for field in ("images", "labelled"):
        given = getattr(options, field)
        if given is not None and not given.exists():
            raise ConfigError(f"{field}: expected a file or folder, got none at {given}")
    task = progress.add_task("read networks", total=len(sources))
    family = load_family(sources, info, lambda network: progress.advance(task))
    fitting, measured = _split_images(options, family)
    progress.console.print(
        f"{len(family.networks)} networks; {len(fitting)} images to fit on, {len(measured)} others "
        "to measure on",
        highlight=False,
    )
    joints = _choose_joints(family, fitting, options, progress)
    progress.console.print(f"{len(joints)} stitched paths to fit and measure", highlight=False)
    maps = _fit(family, joints, fitting, options, progress)
    with tempfile.TemporaryDirectory(prefix="ladderstitch-make-") as work:
        whole = write_family(family, Path(work) / info.name, joints, maps)
        table = _measure(whole, family, measured, options, progress)
        return _keep_best(family, whole, joints, maps, table, options.max_paths, into)


def _split_images(options: MakeOptions, family: LoadedFamily) -> tuple[ImageFiles, ImageFiles]:
    """Return the images to fit on and those to measure on, which are others.

    The latter have labels if the user has given labelled images.
    """
    labelled = None
    if options.labelled is not None and not _classifies_images(family):
        raise ConfigError(
            "labelled: expected none for networks that take or return tensors; their agreement is "
            "measured on --images, and `calibrate --metric` measures other qualities"
        )
    if options.labelled is not None:
        labelled = find_labelled(options.labelled, family.labels)
    if options.images is None:
        assert labelled is not None
        return labelled.split(1 - HELD_OUT, options.seed)
    files = _kind(family).find(options.images)
    return (files, labelled) if labelled is not None else files.split(HELD_OUT, options.seed)


def _classifies_images(family: LoadedFamily) -> bool:
    return family.preprocessing is not None and not family.outputs


def _kind(family: LoadedFamily) -> InputKind:
    return InputKind(family.input_shape, family.preprocessing)


def _choose_joints(
    family: LoadedFamily, files: ImageFiles, options: MakeOptions, progress: Progress
) -> list[Joint]:
    """Return the paths to fit, by cost."""
    joints = list_joints(family.networks)
    if not joints or not options.max_paths:
        return []
    few = files.select(range(min(len(files), MAX_COMPARED_IMAGES)))
    views = max(1, min(MAX_VIEWS_EACH, MAX_COMPARED_IMAGES // len(few)))
    count, batches = _kind(family).views_of(few, views=views, batch_size=BATCH, seed=options.seed)
    total = math.ceil(count / BATCH)
    tracked = progress.track(batches, total=total, description="compare features")
    compared = compare(joints, family.networks, family.scalings, tracked)
    return best_joints(compared, FITTED_RATIO * options.max_paths)


def _fit(
    family: LoadedFamily,
    joints: Sequence[Joint],
    files: ImageFiles,
    options: MakeOptions,
    progress: Progress,
) -> list[Map]:
    """Return the maps of the joints, fitted on views of all images."""
    if not joints:
        return []
    views = max(1, min(MAX_VIEWS_EACH, math.ceil(MIN_VIEWS / len(files))))
    count, batches = _kind(family).views_of(
        files, views=views, batch_size=BATCH, seed=options.seed + 1
    )
    total = math.ceil(count / BATCH)
    tracked = progress.track(batches, total=total, description="fit maps")
    return fit_maps(joints, family.networks, family.scalings, tracked)


def _measure(
    bundle: VisionBundle,
    family: LoadedFamily,
    files: ImageFiles,
    options: MakeOptions,
    progress: Progress,
) -> QualityTable:
    """Return accuracies on labelled images, or else agreements with the last network."""
    count = len(files)
    if not _classifies_images(family):
        return _measure_tensors(bundle, family, files, options, progress)
    inputs = bundle.manifest.preprocessing
    if options.labelled is not None:
        name = f"{count} labelled images of {options.labelled.name}"
        return calibrate(bundle, read_labelled(files, inputs), name, BATCH, progress)
    assert options.images is not None
    views = max(1, min(MAX_VIEWS_EACH, math.ceil(MIN_MEASURED / count)))
    name = f"{count} images of {options.images.name} that no map was fitted on"
    if views > 1:
        name = f"{views} views of each of {name}"
        pixels = load_views(files, inputs, views, options.seed + 2)
    else:
        pixels = load_pixels(files, inputs)
    reference = len(family.networks) - 1
    return calibrate_agreement(bundle, pixels, name, BATCH, progress, reference)


def _measure_tensors(
    bundle: VisionBundle,
    family: LoadedFamily,
    files: ImageFiles,
    options: MakeOptions,
    progress: Progress,
) -> QualityTable:
    """Return agreements with the last network: of classes, or the cosine of tensors."""
    assert options.images is not None
    views = max(1, min(MAX_VIEWS_EACH, math.ceil(MIN_MEASURED / len(files))))
    count, batches = _kind(family).views_of(
        files, views=views, batch_size=BATCH, seed=options.seed + 2
    )
    metric = relative_metric(bundle, "cosine" if family.outputs else "agreement")
    name = f"{len(files)} inputs of {options.images.name} that no map was fitted on"
    if count > len(files):
        name = f"{views} views of each of {name}"
    return measure(bundle, batches, count, metric, None, name, progress)


def _keep_best(
    family: LoadedFamily,
    bundle: VisionBundle,
    joints: Sequence[Joint],
    maps: Sequence[Map],
    table: QualityTable,
    max_paths: int,
    into: Path,
) -> VisionBundle:
    """Write the bundle of the networks and of the best paths, with their qualities.

    A path is kept if no other variant is as cheap and as good. Of more than `max_paths`, those are
    kept that are the best compared with the next cheaper one.
    """
    config, count = bundle.manifest.config, len(family.networks)
    costs = {v.id: float(config.cost(v)[0]) for v in bundle.manifest.variants()}  # type: ignore[union-attr]
    values = {variant: quality.value for variant, quality in table.variants.items()}
    points = frontier(values, costs)
    gains = {
        point.variant: point.quality - (points[number - 1].quality if number else 0.0)
        for number, point in enumerate(points)
        if point.variant >= count
    }
    best = sorted(sorted(gains, key=lambda v: -gains[v])[:max_paths])
    kept = [joints[variant - count] for variant in best]
    final = write_family(family, into, kept, [maps[variant - count] for variant in best])
    olds = [*range(count), *best]
    variants = {new: table.variants[old] for new, old in enumerate(olds)}
    write_table(into / "quality.json", table.model_copy(update={"variants": variants}))
    return VisionBundle.load(final.path)
