"""Benchmark of published families at their real sizes: loading, memory and speed.

Random weights of SN-Net's DeiT Ti/S/B (118.4 M parameters) and Swin Ti/S/B (170.0 M) are written as
a checkpoint, imported, and served. Their anchors run on one 224 x 224 image.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderstitch.client import Client
from ladderstitch.importers.import_bundle import RELEASED_CONFIGS, BundleInfo, import_released
from ladderstitch.importers.stitched_families import read_config
from ladderstitch.runtime.process import tune_malloc
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.bundle import VisionBundle, write_table
from ladderstitch.vision.engine.compiled_executor import CompiledExecutor
from ladderstitch.vision.engine.startup import open_executor
from ladderstitch.vision.models.cost import stitch_cost
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.graphs import cached_units
from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.models.stitched import StitchedModel
from ladderstitch.vision.models.vit import Block, InputShape, Vit, VitConfig
from ladderstitch_loadtest.benchmarks.compiled import time_in_turns
from ladderstitch_loadtest.servers.processes import ladderstitch_server

FAMILIES = ("snnet-deit", "snnet-swin")
MIB = 1 << 20
PAIRS = 200
RUNS = 15
BUDGETS_S = (0.1, 0.4, 3.0)
SHAPE = (3, 224, 224)


@dataclass(frozen=True, slots=True)
class RealSize:
    """The measurements of one family.

    `resident_mib` is the memory that a new process gains by the sessions of all networks, after
    each of them ran. `anchors_ms` are the anchors' milliseconds as served, and `whole_ratios` those
    over a session of the anchor's whole graph.
    """

    family: str
    parameters_m: float
    stitches: int
    tensor_mib: float
    resident_mib: float
    resident_ratio: float
    load_s: float
    anchors_ms: tuple[float, ...]
    whole_ratios: tuple[float, ...]
    ready_s: float
    answers: tuple[str, ...]
    """One line per budget: budget, network, total time."""

    def to_dict(self) -> dict[str, object]:
        """Return the fields for the result file."""
        return asdict(self)


def measure(family: str) -> RealSize:
    """Import random weights of the published sizes, load them in a new process, and serve them."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_random(family, Path(folder))
        loaded = VisionBundle.load(bundle)
        config = loaded.manifest.config
        cached_units(loaded.digest(), loaded.load_stitched, SHAPE, lambda done, total: None)
        cost = json.loads(_load_in_new_process(bundle))
        assert not isinstance(config, NestedConfig)
        with torch.device("meta"):
            model = config.build()
        ready_s, answers = serve_bundle(bundle, model)
    parameters = sum(p.numel() for p in model.parameters())
    mib = parameters * 4 / MIB
    return RealSize(
        family,
        round(parameters / 1e6, 1),
        len(model.stitches),
        round(mib, 1),
        round(cost["mib"], 1),
        round(cost["mib"] / mib, 3),
        round(cost["seconds"], 2),
        tuple(cost["anchors_ms"]),
        tuple(cost["whole_ratios"]),
        ready_s,
        answers,
    )


def _load_in_new_process(bundle: Path) -> str:
    """Return what `print_load_cost` prints."""
    loading = subprocess.run(
        [sys.executable, "-m", "ladderstitch_loadtest.benchmarks.real_sizes", str(bundle)],
        capture_output=True,
        text=True,
        check=True,
    )
    return loading.stdout


def serve_bundle(bundle: Path, model: StitchedModel) -> tuple[float, tuple[str, ...]]:
    """Return the seconds until the server is ready, and a line for one request per budget.

    Random weights have no quality to measure; the server chooses by the networks' share of the
    largest one's MACs instead.
    """
    write_table(bundle / "quality.json", _quality_by_macs(model))
    (bundle.parent / "serve.yaml").write_text("max_batch_size: 1\n")
    started = time.perf_counter()
    flags = ("--no-ray", "--bundle", str(bundle), "--config", str(bundle.parent / "serve.yaml"))
    with ladderstitch_server(*flags) as served, Client(served.address) as client:
        ready_s = round(time.perf_counter() - started, 1)
        image = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), np.uint8)
        answers = []
        for budget_s in BUDGETS_S:
            answer = client.predict(image, budget_s=budget_s)
            answers.append(f"{budget_s} s: {answer.variant_name} in {answer.total_s:.3f} s")
    return ready_s, tuple(answers)


def _quality_by_macs(model: StitchedModel) -> QualityTable:
    macs = _macs(model)
    largest = max(macs.values())
    return QualityTable(
        metric="share of the largest network's MACs",
        data="none",
        n=1,
        confidence=0.95,
        date="",
        versions={},
        variants={s: Quality(value=n / largest, low=0.0, high=1.0) for s, n in macs.items()},
    )


def write_random(family: str, folder: Path) -> Path:
    """Write a checkpoint of random weights, import it, and return the bundle's folder."""
    torch.manual_seed(0)
    model = read_config(family, RELEASED_CONFIGS[family]).build()
    torch.save({"model": model.state_dict()}, folder / "checkpoint.pth")
    info = BundleInfo(family, "none: random weights", None, None, None)
    import_released(family, folder / "checkpoint.pth", None, info, folder / "bundle")
    (folder / "checkpoint.pth").unlink()
    return folder / "bundle"


def print_load_cost(path: Path) -> None:
    """Print, as JSON, what the served networks of a bundle cost; their units are in the cache.

    The networks are joined in the order of their MACs, as far as the memory for copies lasts.
    """
    tune_malloc()
    bundle = VisionBundle.load(path)
    config = bundle.manifest.config
    assert not isinstance(config, NestedConfig)
    stitches = config.stitches()
    with torch.device("meta"):
        macs = _macs(config.build())
    images = np.random.default_rng(0).standard_normal((1, *SHAPE), np.float32)
    before, started = resident_mib(), time.perf_counter()
    executor = open_executor(bundle, 1, lambda done, total: None)
    executor.join(sorted(macs, key=macs.__getitem__))
    seconds = time.perf_counter() - started
    for stitch in stitches:
        executor(images, stitch.id)
    cost: dict[str, Any] = {"mib": resident_mib() - before, "seconds": seconds}
    anchors = [_compare_anchor(executor, anchor, images) for anchor in range(3)]
    cost["anchors_ms"] = [round(served, 2) for served, _ in anchors]
    cost["whole_ratios"] = [round(served / whole, 3) for served, whole in anchors]
    print(json.dumps(cost))  # noqa: T201


def _compare_anchor(executor: CompiledExecutor, anchor: int, images: Pixels) -> tuple[float, float]:
    """Return the milliseconds of an anchor as served, and in a session of its whole graph."""
    whole = executor.open_whole(anchor)
    calls = {"served": lambda: executor(images, anchor), "whole": lambda: whole(images)}
    ms = time_in_turns(calls, RUNS)
    return ms["served"], ms["whole"]


def _macs(model: StitchedModel) -> dict[int, int]:
    return {stitch.id: stitch_cost(model, stitch, SHAPE[-1]).macs for stitch in model.stitches}


def resident_mib() -> float:
    """Return the anonymous memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def executor_overhead() -> dict[str, object]:
    """Compare `StitchExecutor` with a straight-line forward pass of DeiT-S at batch size 1.

    The two run in interleaved pairs in alternating order; the result is the median of the pairs'
    ratios of times.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = VitConfig(embed_dim=384, depth=12, num_heads=6)
    vit = Vit(InputShape(image_size=224, num_classes=1000), config).eval().requires_grad_(False)
    nn.init.normal_(vit.pos_embed, std=0.02)
    family = read_config("snnet-deit", {**RELEASED_CONFIGS["snnet-deit"]})
    model: StitchedModel = family.build().eval().requires_grad_(False)
    model.backbones()[1].load_state_dict(vit.state_dict())
    serving = StitchExecutor(model)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(serving(images, 1), straight_line(vit, images))
        ratio = _median_ratio(lambda: serving(images, 1), lambda: straight_line(vit, images))
    return {"pairs": PAIRS, "median_ratio": round(ratio, 4)}


def _median_ratio(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> float:
    """Return the median over `PAIRS` pairs of the first call's seconds over the second's."""
    calls, ratios = (first, second), []
    for number in range(PAIRS + 10):
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {index: _seconds(calls[index]) for index in order}
        if number >= 10:  # the first pairs are warm-up
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def _seconds(call: Callable[[], Tensor]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def straight_line(vit: Vit, images: Tensor) -> Tensor:
    """Return DeiT-S logits computed with the same libraries, without routes, plans or modules."""
    multiply = torch.ops.mkldnn._linear_pointwise
    stem = vit.patch_embed.proj
    assert isinstance(stem, nn.Conv2d)
    patches = F.conv2d(images, stem.weight, stem.bias, stem.stride).flatten(2).transpose(1, 2)
    x = torch.cat((vit.cls_token, patches), dim=1) + vit.pos_embed
    for block in vit.blocks:
        assert isinstance(block, Block)
        norm, attn = block.norm1, block.attn
        y = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        y = multiply(y, attn.qkv.weight, attn.qkv.bias, "none", [], "")
        q, k, v = y.view(1, 197, 3, 6, 64).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 197, 384)
        x = x + multiply(y, attn.proj.weight, attn.proj.bias, "none", [], "")
        norm, mlp = block.norm2, block.mlp
        y = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        y = F.gelu(multiply(y, mlp.fc1.weight, mlp.fc1.bias, "none", [], ""))
        x = x + multiply(y, mlp.fc2.weight, mlp.fc2.bias, "none", [], "")
    norm = vit.norm
    cls = F.layer_norm(x[:, 0], norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return F.linear(cls, vit.head.weight, vit.head.bias)


if __name__ == "__main__":
    print_load_cost(Path(sys.argv[1]))
