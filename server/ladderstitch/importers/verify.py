"""Checks of imported models against recorded outputs of the original implementations.

This module reads the cases and checks the vision models: stitched families, single anchors, the
fitting of stitching layers and the least-squares solver. `verify_text` runs the language models and
`verify_nested` the supernets.

A case is `NAME.safetensors` (tensors `weights.*`, `input`, and `output.<id>`, or `feature.*` and
`solution.*` for least squares) with `NAME.json` (family, config, tolerance) in the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.importers import nested_families, verify_text
from ladderstitch.importers.stitched_families import import_model
from ladderstitch.importers.verify_nested import compare_nested
from ladderstitch.importers.vision_anchors import anchor_from_tensors
from ladderstitch.training.vision.stitching_layers import (
    initialise_stitching_layers,
    solve_affine,
    stitched_pairs,
)
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.stitched import StitchedModel
from ladderstitch.vision.models.vit import Vit

ANCHOR_FAMILIES = ("hf-vit", "hf-deit", "hf-swin")
"""Families of cases with a single network in Hugging Face's layout."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The result of one case.

    `num_checked` is the number of items, of the kind that `checked` names, e.g. "ids". The error
    is relative to the largest magnitude of the recorded tensor. `detail` lists the items outside
    the tolerance.
    """

    name: str
    family: str
    num_checked: int
    checked: str
    max_relative_error: float
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Relative errors by item, the items outside the tolerance, and what the items are."""

    checked: str
    errors: Mapping[Any, float]
    wrong: Sequence[Any]
    mismatch: str = ""

    def result(self, name: str, family: str) -> CaseResult:
        """Return the result of the case with this name."""
        detail = self.mismatch
        if self.wrong:
            detail = f"outside tolerance: {self.checked} {self.wrong}"
        worst = max(self.errors.values(), default=float("inf"))
        passed = bool(self.errors) and not detail
        return CaseResult(name, family, len(self.errors), self.checked, worst, passed, detail)


def verify_case(path: Path) -> CaseResult:
    """Run one case and return its result; raises `DataError` if its files cannot be read."""
    metadata = _read_metadata(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: {error}") from error
    try:
        return _compare(metadata, tensors).result(path.stem, metadata["family"])
    except KeyError as error:
        raise DataError(f"{path}: the case lacks {error}") from error


def _compare(metadata: Mapping[str, Any], tensors: Tensors) -> _Comparison:
    weights = _with_prefix(tensors, "weights.")
    family = metadata["family"]
    if family in verify_text.FAMILIES:
        return _compare_text(metadata, tensors, weights)
    if family in nested_families.LAYOUTS:
        return _Comparison("items", *compare_nested(metadata, tensors, weights))
    if family in ANCHOR_FAMILIES:
        return _compare_anchor(metadata, tensors, weights)
    if family == "least-squares-solver":
        return _compare_solver(metadata, tensors)
    model = import_model(family, metadata["config"], weights)
    outputs = _with_prefix(tensors, "output.")
    if outputs:
        return _compare_stitches(metadata, model, tensors["input"], outputs)
    return _compare_stitching_layers(metadata, model, tensors["input"], weights)


def _with_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def _compare_stitches(
    metadata: Mapping[str, Any], model: StitchedModel, images: Tensor, outputs: Tensors
) -> _Comparison:
    """Check the output of every stitch with the case's absolute and relative tolerance."""
    tolerance = metadata["tolerance"]
    atol, rtol = tolerance["suggested_atol"], tolerance["suggested_rtol"]
    expected = {int(stitch): tensor for stitch, tensor in outputs.items()}
    if expected.keys() != {stitch.id for stitch in model.stitches}:
        mismatch = f"ids differ: {len(expected)} recorded, {len(model.stitches)} enumerated"
        return _Comparison("ids", {}, [], mismatch)
    serving = StitchExecutor(model)
    errors, wrong = {}, []
    with torch.inference_mode():
        for stitch, wanted in sorted(expected.items()):
            got = serving(images, stitch)
            errors[stitch] = _relative_error(got, wanted)
            if not torch.allclose(got, wanted, atol=atol, rtol=rtol):
                wrong.append(stitch)
    return _Comparison("ids", errors, wrong)


def _compare_anchor(metadata: Mapping[str, Any], tensors: Tensors, weights: Tensors) -> _Comparison:
    """Check the logits of a network in Hugging Face's layout, and each head's if it has two."""
    backbone = anchor_from_tensors(weights, metadata["config"]["hf_config"]).build()
    images, atol = tensors["input"], metadata["tolerance"]["suggested_atol"]
    with torch.inference_mode():
        got = {"logits": backbone(images)}
        if isinstance(backbone, Vit):
            x = backbone.embed(images)
            for step in backbone.steps():
                x = step(x)
            heads = backbone.head_logits(x, final_norm=True)
            got |= dict(zip(("cls_logits", "distillation_logits"), heads, strict=False))
    errors, wrong = {}, []
    for name in [entry["id"] for entry in metadata["ids"]]:
        wanted = tensors[f"output.{name}"]
        errors[name] = _relative_error(got[name], wanted)
        if not torch.allclose(got[name], wanted, atol=atol, rtol=0):
            wrong.append(name)
    return _Comparison("outputs", errors, wrong)


def _compare_solver(metadata: Mapping[str, Any], tensors: Tensors) -> _Comparison:
    """Check the least-squares solver on recorded features."""
    allowed = metadata["tolerance"]["suggested_relative_for_solver_on_stored_features"]
    errors = {}
    for layer in metadata["layers"]:
        name = layer["key"]
        solved = solve_affine(tensors[f"feature.{name}.x"], tensors[f"feature.{name}.y"])
        for part, got in zip(("weight", "bias"), solved, strict=True):
            errors[f"{name}.{part}"] = _relative_error(got, tensors[f"solution.{name}.{part}"])
    return _Comparison("solutions", errors, _above(errors, allowed))


def _compare_stitching_layers(
    metadata: Mapping[str, Any], model: StitchedModel, images: Tensor, weights: Tensors
) -> _Comparison:
    """Fit every stitching layer on our own features and compare it with the recorded one."""
    allowed = metadata["tolerance"]["suggested_relative_from_own_features"]
    for layer in stitched_pairs(model.stitches):
        for parameter in model.affine(layer).parameters():
            parameter.zero_()
    initialise_stitching_layers(model, images)
    errors = {
        name: _relative_error(tensor, weights[name])
        for name, tensor in model.state_dict().items()
        if name.startswith("stitch_layers")
    }
    return _Comparison("least-squares tensors", errors, _above(errors, allowed))


def _above(errors: Mapping[str, float], allowed: float) -> list[str]:
    """Return the items whose error exceeds the limit or is not a number."""
    return [name for name, error in errors.items() if not error <= allowed]


def _compare_text(metadata: Mapping[str, Any], tensors: Tensors, weights: Tensors) -> _Comparison:
    """Check every recorded output on every rank count that its scheme and its heads allow."""
    tolerance, prefill = metadata["tolerance"], metadata["config"]["prefill_length"]
    atol, rtol = tolerance["suggested_atol"], tolerance["suggested_rtol"]
    errors: dict[str, float] = {}
    wrong: list[str] = []
    tried: set[int] = set()
    for number, (architecture, ours) in enumerate(verify_text.read_model(metadata, weights)):
        for run in verify_text.recorded_runs(metadata, architecture):
            wanted = tensors[f"output.{run.output}"]
            for ranks in run.rank_counts if number == 0 else run.rank_counts[:1]:
                item = f"{run.output} on {ranks} ranks" + ", config of transformers 5" * number
                config, tokens = architecture.config, tensors["input"]
                got = verify_text.run_case(config, ours, tokens, run, ranks, prefill)
                errors[item] = _relative_error(got, wanted)
                tried.add(ranks)
                if not torch.allclose(got, wanted, atol=atol, rtol=rtol):
                    wrong.append(item)
                if run.greedy_tokens and (got.argmax(-1) != tensors["output.greedy"]).any():
                    wrong.append(f"tokens of {item}")
    counts = sorted(tried)
    return _Comparison(f"outputs on {', '.join(map(str, counts))} ranks", errors, wrong)


def _read_metadata(path: Path) -> dict[str, Any]:
    file = path.with_suffix(".json")
    try:
        metadata = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
    if not isinstance(metadata, dict):
        raise DataError(f"{file}: expected an object, got {type(metadata).__name__}")
    return metadata
