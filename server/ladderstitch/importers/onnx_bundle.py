"""Write the bundle of ONNX networks: networks, affine maps, manifest and known qualities."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import save_file

from ladderstitch.errors import ConfigError
from ladderstitch.importers.onnx_networks import (
    FamilyInfo,
    LoadedFamily,
    find_sources,
    load_family,
)
from ladderstitch.runtime.device import versions
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.training.vision.pairs import Joint
from ladderstitch.vision.bundle import VisionBundle, VisionManifest, write_manifest, write_table
from ladderstitch.vision.networks.config import (
    NetworkEntry,
    NetworkInputs,
    OnnxConfig,
    StitchedPath,
    TensorInputs,
)
from ladderstitch.vision.networks.export import NETWORKS_FOLDER
from ladderstitch.vision.networks.probe import Cut

GIVEN = "given by the user"
UNKNOWN = "unknown (not calibrated)"

Map = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Weight [D_end, D_front] and bias [D_end]."""


def import_networks(paths: Sequence[Path], info: FamilyInfo, into: Path) -> VisionBundle:
    """Write the bundle of independent networks, and return it.

    Qualities that the `family.yaml` states are written to it. One network alone needs none.
    Raises `BundleError` or `ConfigError` that names what does not fit.
    """
    sources = find_sources(paths)
    bundle = write_family(load_family(sources, info), into)
    qualities = {source.name: source.quality for source in sources}
    variants = {v.id: qualities[v.name] for v in bundle.manifest.variants()}
    if all(quality is not None for quality in variants.values()):
        _write_qualities(into, GIVEN, {v: (q, q, q) for v, q in variants.items() if q is not None})
    elif len(sources) == 1:
        _write_qualities(into, UNKNOWN, {0: (0.0, 0.0, 1.0)})
    return VisionBundle.load(into)


def _write_qualities(
    into: Path, metric: str, qualities: dict[int, tuple[float, float, float]]
) -> None:
    """Write qualities that were not measured here; each is value, low and high."""
    table = QualityTable(
        metric=metric,
        data="none",
        n=1,
        confidence=0.95,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        variants={
            variant: Quality(value=value, low=low, high=high)
            for variant, (value, low, high) in qualities.items()
        },
    )
    write_table(into / "quality.json", table)


def build_config(family: LoadedFamily, joints: Sequence[Joint] = ()) -> OnnxConfig:
    """Return the configuration of networks that are stitched at `joints`."""
    count = len(family.networks)
    cuts = [
        sorted(
            {j.leave for j in joints if j.front == n} | {j.enter for j in joints if j.end == n},
            key=lambda cut, n=n: family.networks[n].flow.writer[cut.name],  # type: ignore[misc]
        )
        for n in range(count)
    ]
    return OnnxConfig(
        inputs=_build_inputs(family),
        outputs=family.outputs,
        networks=tuple(_build_entry(family, n, cuts[n]) for n in range(count)),
        paths=tuple(
            StitchedPath(
                front=j.front,
                leave=cuts[j.front].index(j.leave),
                end=j.end,
                enter=cuts[j.end].index(j.enter),
                macs=j.ends[0].map_macs(j.ends[1]),
                parameters=(j.ends[0].width + 1) * j.ends[1].width,
            )
            for j in joints
        ),
    )


def _build_inputs(family: LoadedFamily) -> NetworkInputs | TensorInputs:
    ((name, shape),) = family.networks[-1].info.inputs.items()
    num_classes = len(family.labels) or None
    if family.preprocessing is None:
        return TensorInputs(name=name, shape=shape, num_classes=num_classes)
    images = family.preprocessing
    fields = {"in_channels": shape[0], "height": images.height, "width": images.width}
    return NetworkInputs.model_validate({**fields, "num_classes": num_classes})


def _build_entry(family: LoadedFamily, position: int, cuts: Sequence[Cut]) -> NetworkEntry:
    network, settings = family.networks[position], family.settings[position]
    macs = [0, *(cut.macs for cut in cuts), network.info.macs]
    parameters = [0, *(cut.parameters for cut in cuts), network.info.parameters]
    images = family.preprocessing
    own_names: tuple[str, ...] = ()
    if family.outputs and family.output_names[position] != family.output_names[-1]:
        own_names = family.output_names[position]
    name = re.sub(r"[^A-Za-z0-9._-]", "-", family.sources[position].name).lstrip("._-")[:60]
    return NetworkEntry(
        name=name or f"network-{position}",
        file=f"{name or position}.onnx",
        mean=settings.mean if images is not None and settings.mean != images.mean else None,
        std=settings.std if images is not None and settings.std != images.std else None,
        cuts=tuple(cut.name for cut in cuts),
        macs=tuple(b - a for a, b in pairwise(macs)),
        parameters=tuple(b - a for a, b in pairwise(parameters)),
        size=family.own_size(position),
        crop=family.kept_share(position),
        outputs=own_names,
    )


def write_family(
    family: LoadedFamily, into: Path, joints: Sequence[Joint] = (), maps: Sequence[Map] = ()
) -> VisionBundle:
    """Write networks, maps and manifest, and return the bundle, which has no measurements."""
    config = build_config(family, joints)
    origin = " + ".join(
        f"{s.path.name} (SHA-256 {hashlib.sha256(s.path.read_bytes()).hexdigest()[:16]})"
        for s in family.sources
    )
    try:
        manifest = VisionManifest(
            name=family.info.name,
            family="onnx",
            config=config,
            labels=family.labels,
            preprocessing=family.preprocessing,
            origin=origin,
            licence=family.info.licence,
        )
    except ValidationError as error:
        raise ConfigError(f"bundle: {error}") from error
    (into / NETWORKS_FOLDER).mkdir(parents=True, exist_ok=True)
    for entry, network in zip(config.networks, family.networks, strict=True):
        onnx.save(network.model, into / NETWORKS_FOLDER / entry.file)
    weights = into / "weights.safetensors"
    weights.unlink(missing_ok=True)
    if joints:
        tensors = {}
        for path, (weight, bias) in zip(config.paths, maps, strict=True):
            tensors[f"{path.layer}.weight"] = np.ascontiguousarray(weight)
            tensors[f"{path.layer}.bias"] = np.ascontiguousarray(bias)
        save_file(tensors, weights)
    write_manifest(into, manifest)
    return VisionBundle.load(into)
