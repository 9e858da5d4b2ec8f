"""Whether networks of the zoo are exported, cut, stitched and served as they compute.

Each network goes through the commands of its users. What a server answers is compared with ONNX
Runtime's own outputs of the exported file. The answer of a stitched path is compared with its parts
computed apart: the front network up to its cut, the map, and the end network with one tensor
replaced.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.client import Client
from ladderstitch.errors import UserError
from ladderstitch.importers.image_settings import ImageSettings
from ladderstitch.importers.onnx_bundle import write_family
from ladderstitch.importers.onnx_networks import FamilyInfo, LoadedFamily, find_sources, load_family
from ladderstitch.importers.torch_sources import SourceOptions, open_source
from ladderstitch.runtime.device import versions
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.training.vision.pairs import Joint, best_joints, compare, fit_maps, list_joints
from ladderstitch.vision.bundle import VisionBundle, write_table
from ladderstitch.vision.networks.maps import Features
from ladderstitch.vision.networks.probe import Cut
from ladderstitch_loadtest.benchmarks.own_networks_oracle import (
    REPLACED,
    Array,
    apply_map,
    difference,
    random_inputs,
    replace_tensor,
    run_file,
)
from ladderstitch_loadtest.benchmarks.own_networks_zoo import (
    Architecture,
    ZooNetwork,
    write_source,
)

TOLERANCE = 1e-4
"""Largest difference, relative to the largest output."""
MIN_VARIATION = 0.05
"""Smallest difference between two images; equal outputs would prove nothing."""
INPUT = "pixels"
DEADLINE_S = 120.0
SETTINGS = ImageSettings(mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.875, resize="bicubic")
"""Preprocessing of all networks; those of one architecture often have different ones."""
PATHS = 4
"""Stitched paths of an architecture that are fitted and served."""
COMPARED, FITTED, ASKED = 8, 16, 3
"""Random inputs that features are compared on, that maps are fitted on, and that are served."""


class CheckFailed(UserError):
    """A command failed for a network of the zoo."""


@dataclass(slots=True)
class NetworkResult:
    """What was seen of one network.

    `blocks` counts the blocks of the torch module, and `blocks_cut` those whose output is the
    tensor at a cut. `outputs` has shapes without the batch. `served_difference` is relative to the
    largest output. So is `variation`, the largest difference between the outputs of two images.
    """

    architecture: str
    network: str
    library: str
    parameters: int
    opset: int
    input: list[int]
    outputs: dict[str, list[int]]
    cuts: int
    blocks: int
    blocks_cut: int
    variation: float
    served_difference: float = float("nan")


@dataclass(slots=True)
class PairResult:
    """What was seen of the paths between the networks of one architecture.

    `candidates` counts the pairs of cuts that a map can join; `reason` says why there are none.
    """

    architecture: str
    candidates: int
    paths: int
    reason: str = ""
    served_difference: float = float("nan")


@dataclass(slots=True)
class Prepared:
    """The exported files of an architecture, its bundle, and what is known so far."""

    files: list[Path]
    networks: list[NetworkResult]
    pair: PairResult
    bundle: VisionBundle


def prepare(
    architecture: Architecture, work: Path, home: Path, status: Callable[[str], None]
) -> Prepared:
    """Export the networks of an architecture, and write their bundle with stitched paths.

    Raises `CheckFailed` if a command fails.
    """
    files, modules = [], []
    for number, network in enumerate(architecture.networks):
        status(f"{architecture.name}: {network.name}")
        file, module = _export(network, number, work)
        files.append(file)
        modules.append(module)
    status(f"{architecture.name}: stitch")
    name = re.sub(r"[^a-z0-9]+", "-", architecture.name.lower())
    family = load_family(find_sources(files), FamilyInfo(name, settings=SETTINGS))
    cuts = {s.path: list(n.info.cuts) for s, n in zip(family.sources, family.networks, strict=True)}
    results = [
        _describe(architecture, network, file, module, cuts[file])
        for network, file, module in zip(architecture.networks, files, modules, strict=True)
    ]
    candidates = list_joints(family.networks)
    chosen = _choose(candidates, family)
    inputs = random_inputs(FITTED, architecture.networks[0].shape, seed=2)
    maps = fit_maps(chosen, family.networks, family.scalings, [inputs]) if chosen else []
    bundle = write_family(family, home / name, chosen, maps)
    _write_qualities(bundle)
    reason = _explain(family, candidates)
    pair = PairResult(architecture.name, len(candidates), len(chosen), reason)
    return Prepared(files, results, pair, bundle)


def serve(prepared: Prepared, client: Client) -> None:
    """Compare what a server answers with the networks' files, and add the differences."""
    config: Any = prepared.bundle.manifest.config
    model, count = prepared.bundle.manifest.name, len(config.networks)
    by_name = {path.stem: number for number, path in enumerate(prepared.files)}
    order = [by_name[entry.name] for entry in config.networks]
    files = [onnx.load(prepared.files[number]) for number in order]
    results = [prepared.networks[number] for number in order]
    inputs = random_inputs(ASKED, results[0].input, seed=7)
    for variant, (file, result) in enumerate(zip(files, results, strict=True)):
        names = list(result.outputs)
        answers = _ask(client, model, inputs, variant, names)
        result.served_difference = difference(answers, run_file(file, names, {INPUT: inputs}))
    weights = load_file(prepared.bundle.weights_path) if config.paths else {}
    found = []
    for variant, path in enumerate(config.paths, start=count):
        names = list(results[path.end].outputs)
        answers = _ask(client, model, inputs, variant, names)
        leave = config.networks[path.front].cuts[path.leave]
        enter = config.networks[path.end].cuts[path.enter]
        (features,) = run_file(files[path.front], [leave], {INPUT: inputs})
        (whole,) = run_file(files[path.end], [enter], {INPUT: inputs})
        layer = (weights[f"{path.layer}.weight"], weights[f"{path.layer}.bias"])
        mapped = apply_map(features, whole.shape, *layer)
        copy = onnx.ModelProto.FromString(files[path.end].SerializeToString())
        given = {INPUT: inputs, REPLACED: mapped}
        found.append(difference(answers, run_file(replace_tensor(copy, enter), names, given)))
    if found:
        prepared.pair.served_difference = max(found)


def failures(networks: Sequence[NetworkResult], pairs: Sequence[PairResult]) -> list[str]:
    """Return a line for each network and each pair whose answers are not those of its files."""
    lines = []
    for network in networks:
        if not network.served_difference <= TOLERANCE:
            lines.append(f"{network.network}: served difference {network.served_difference:.1e}")
        if not network.variation >= MIN_VARIATION:
            lines.append(f"{network.network}: all images have the same outputs")
    return lines + [
        f"{pair.architecture}: paths differ by {pair.served_difference:.1e}"
        for pair in pairs
        if pair.paths and not pair.served_difference <= TOLERANCE
    ]


def to_dict(networks: Sequence[NetworkResult], pairs: Sequence[PairResult]) -> dict[str, Any]:
    """Return the fields of a result file."""
    return {
        "tolerance": TOLERANCE,
        "networks": [asdict(network) for network in networks],
        "pairs": [asdict(pair) for pair in pairs],
    }


def _export(network: ZooNetwork, number: int, work: Path) -> tuple[Path, nn.Module]:
    """Run `export` and `inspect` for one network; return its file and the torch module."""
    file = work / f"{network.name}-{number}.onnx"
    with tempfile.TemporaryDirectory(dir=work) as folder:
        source = write_source(network, Path(folder))
        for command in (["export", *source, "--output", str(file)], ["inspect", str(file)]):
            ended = CliRunner().invoke(app, command)
            if ended.exit_code:
                raise CheckFailed(f"{' '.join(command)}: {ended.output} {ended.exception or ''}")
        checkpoint = Path(folder) / "weights.safetensors"
        given = SourceOptions(network.shape, checkpoint if checkpoint.is_file() else None)
        return file, open_source(source[0], given).network.eval()


def _describe(
    architecture: Architecture, network: ZooNetwork, file: Path, module: nn.Module, cuts: list[Cut]
) -> NetworkResult:
    """Return what is known of a network before it is served."""
    model = onnx.load(file)
    names = [output.name for output in model.graph.output]
    inputs = random_inputs(2, network.shape)
    tensors = run_file(model, [*names, *(cut.name for cut in cuts)], {INPUT: inputs})
    blocks = find_blocks(module, inputs, architecture.block, tensors[len(names) :])
    shapes = {n: list(v.shape[1:]) for n, v in zip(names, tensors[: len(names)], strict=True)}
    return NetworkResult(
        architecture.name,
        network.name,
        network.library,
        sum(parameter.numel() for parameter in module.parameters()),
        model.opset_import[0].version,
        list(network.shape),
        shapes,
        len(cuts),
        len(blocks),
        sum(blocks),
        min(float(np.ptp(v, 0).max() / np.abs(v).max()) for v in tensors[: len(names)]),
    )


def find_blocks(
    module: nn.Module, inputs: Array, pattern: str, cuts: Sequence[Array]
) -> list[bool]:
    """Return for each block of a torch module whether its output is the tensor at a cut.

    Blocks are the modules whose class names match. Tensors are equal if their elements are, in
    order: the layout of tokens may differ.
    """
    outputs: list[Array] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).numpy())

    blocks = [part for part in module.modules() if re.fullmatch(pattern, type(part).__name__)]
    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        module(torch.from_numpy(inputs))
    for handle in handles:
        handle.remove()
    return [
        any(
            cut.size == output.size and difference([cut.ravel()], [output.ravel()]) <= TOLERANCE
            for cut in cuts
        )
        for output in outputs
    ]


def _choose(candidates: list[Joint], family: LoadedFamily) -> list[Joint]:
    """Return at most `PATHS` of the joints, as `make` does with few images."""
    if not candidates:
        return []
    (shape,) = family.networks[-1].info.inputs.values()
    inputs = random_inputs(COMPARED, shape, seed=1)
    compared = compare(candidates, family.networks, family.scalings, [inputs])
    return best_joints(compared, PATHS)


def _explain(family: LoadedFamily, candidates: list[Joint]) -> str:
    """Return why no path can be made; empty if there are some."""
    if candidates:
        return ""
    if len(family.networks) == 1:
        return "one size only"
    usable = [[c for c in n.info.cuts if Features.of(c.shape) is not None] for n in family.networks]
    if not all(usable):
        return "no cut with features that a map joins"
    return "no path costs more than the small network and less than the large one"


def _write_qualities(bundle: VisionBundle) -> None:
    """Write qualities without meaning, which a server needs of a family."""
    known = Quality(value=0.5, low=0.0, high=1.0)
    table = QualityTable(
        metric="none",
        data="none",
        n=1,
        confidence=0.95,
        date="2026-01-01",
        versions=versions(),
        variants={variant.id: known for variant in bundle.manifest.variants()},
    )
    write_table(bundle.path / "quality.json", table)


def _ask(client: Client, model: str, inputs: Array, variant: int, names: list[str]) -> list[Array]:
    """Return the outputs of a server in the order of their names."""
    answer = client.predict(inputs, model=model, variant=variant, timeout_s=DEADLINE_S)
    if not answer.outputs:
        return [answer.logits]
    return [np.asarray(answer.outputs[name], np.float32) for name in names]
