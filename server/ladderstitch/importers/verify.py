"""Check the importer and the forward pass against recorded outputs of the original implementations.

A case is `NAME.safetensors` (tensors `weights.*`, `input`, and `output.<id>`, or `feature.*` and
`solution.*` for least squares) beside `NAME.json` (family, config, tolerance).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.importers import verify_text
from ladderstitch.importers.stitched_families import import_model
from ladderstitch.importers.vision_anchors import plain_anchor
from ladderstitch.training.vision.stitching_layers import (
    initialise_stitching_layers,
    solve_affine,
    stitched_pairs,
)
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.stitched import StitchedModel
from ladderstitch.vision.models.vit import Vit

PLAIN = ("hf-vit", "hf-deit", "hf-swin")


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case's outcome; errors are relative to the largest magnitude of the reference."""

    case: str
    family: str
    checked: int
    what: str
    largest_relative_error: float
    passed: bool
    detail: str = ""


def verify_case(path: Path) -> CaseResult:
    """Run one case; raises `DataError` if its files cannot be read."""
    sheet = _read_sheet(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: {error}") from error
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights.")
    }
    try:
        family = sheet["family"]
        if family in verify_text.FAMILIES:
            return _verify_language(path.stem, sheet, tensors, weights)
        if family in PLAIN:
            return _verify_plain(path.stem, sheet, tensors, weights)
        if family == "least-squares-solver":
            return _verify_solver(path.stem, sheet, tensors)
        model = import_model(family, sheet["config"], weights)
        if any(name.startswith("output.") for name in tensors):
            return _verify_outputs(path.stem, sheet, model, tensors["input"], tensors)
        return _verify_least_squares(path.stem, sheet, model, tensors["input"], weights)
    except KeyError as error:
        raise DataError(f"{path}: the case lacks {error}") from error


def _verify_outputs(
    case: str,
    sheet: Mapping[str, Any],
    model: StitchedModel,
    images: Tensor,
    tensors: Mapping[str, Tensor],
) -> CaseResult:
    """Every id that the case records, within the case's absolute and relative tolerance."""
    tolerance = sheet["tolerance"]
    expected = {
        int(name.removeprefix("output.")): tensor
        for name, tensor in tensors.items()
        if name.startswith("output.")
    }
    if expected.keys() != {stitch.id for stitch in model.stitches}:
        detail = f"ids differ: {len(expected)} recorded, {len(model.stitches)} enumerated"
        return CaseResult(case, sheet["family"], 0, "ids", float("inf"), False, detail)
    serving = StitchExecutor(model)
    worst, wrong = 0.0, []
    with torch.inference_mode():
        for stitch, wanted in sorted(expected.items()):
            got = serving(images, stitch)
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
            atol, rtol = tolerance["suggested_atol"], tolerance["suggested_rtol"]
            if not torch.allclose(got, wanted, atol=atol, rtol=rtol):
                wrong.append(stitch)
    detail = f"outside tolerance: ids {wrong}" if wrong else ""
    return CaseResult(case, sheet["family"], len(expected), "ids", worst, not wrong, detail)


def _verify_plain(
    case: str,
    sheet: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> CaseResult:
    """A network in Hugging Face's layout: its logits, and each head's where it has two."""
    trunk = plain_anchor(weights, sheet["config"]["hf_config"]).build()
    images, tolerance = tensors["input"], sheet["tolerance"]
    with torch.inference_mode():
        got = {"logits": trunk(images)}
        if isinstance(trunk, Vit):
            x = trunk.embed(images)
            for step in trunk.steps():
                x = step(x)
            heads = trunk.head_logits(x, final_norm=True)
            got |= dict(zip(("cls_logits", "distillation_logits"), heads, strict=False))
    worst, wrong = 0.0, []
    recorded = [entry["id"] for entry in sheet["ids"]]
    for name in recorded:
        wanted = tensors[f"output.{name}"]
        worst = max(worst, float((got[name] - wanted).abs().max() / wanted.abs().max()))
        if not torch.allclose(got[name], wanted, atol=tolerance["suggested_atol"], rtol=0):
            wrong.append(name)
    detail = f"outside tolerance: {wrong}" if wrong else ""
    return CaseResult(case, sheet["family"], len(recorded), "outputs", worst, not wrong, detail)


def _verify_solver(
    case: str, sheet: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> CaseResult:
    """The least-squares solver on plain matrices."""
    allowed = sheet["tolerance"]["suggested_relative_for_solver_on_stored_features"]
    errors = {}
    for layer in sheet["layers"]:
        name = layer["key"]
        solved = solve_affine(tensors[f"feature.{name}.x"], tensors[f"feature.{name}.y"])
        for part, got in zip(("weight", "bias"), solved, strict=True):
            wanted = tensors[f"solution.{name}.{part}"]
            errors[f"{name}.{part}"] = float((got - wanted).abs().max() / wanted.abs().max())
    wrong = [name for name, error in errors.items() if not error <= allowed]
    detail = f"outside tolerance: {wrong}" if wrong else ""
    worst = max(errors.values())
    return CaseResult(case, sheet["family"], len(errors), "solutions", worst, not wrong, detail)


def _verify_language(
    case: str,
    sheet: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> CaseResult:
    """Every recorded output, in one pass and token by token, on every rank count it allows."""
    config, ours = verify_text.read_model(sheet, weights)
    tolerance, prefill = sheet["tolerance"], sheet["config"]["prefill_length"]
    worst, wrong, checked = 0.0, [], 0
    for run in verify_text.recorded_runs(sheet):
        wanted = tensors[f"output.{run.output}"]
        for ranks in run.rank_counts:
            got = verify_text.run_case(config, ours, tensors["input"], run, ranks, prefill)
            checked += 1
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
            atol, rtol = tolerance["suggested_atol"], tolerance["suggested_rtol"]
            if not torch.allclose(got, wanted, atol=atol, rtol=rtol):
                wrong.append(f"{run.output} on {ranks} ranks")
    detail = f"outside tolerance: {wrong}" if wrong else ""
    return CaseResult(case, sheet["family"], checked, "outputs", worst, not wrong, detail)


def _verify_least_squares(
    case: str,
    sheet: Mapping[str, Any],
    model: StitchedModel,
    images: Tensor,
    weights: Mapping[str, Tensor],
) -> CaseResult:
    """Solve every stitching layer anew from our own features and compare with the recorded one."""
    allowed = sheet["tolerance"]["suggested_relative_from_own_features"]
    for layer in stitched_pairs(model.stitches):
        for parameter in model.affine(layer).parameters():
            parameter.zero_()
    initialise_stitching_layers(model, images)
    solved = {name: t for name, t in model.state_dict().items() if name.startswith("stitch_layers")}
    errors = {
        name: float((tensor - weights[name]).abs().max() / weights[name].abs().max())
        for name, tensor in solved.items()
    }
    wrong = [name for name, error in errors.items() if not error <= allowed]
    detail = f"outside tolerance: {wrong}" if wrong else ""
    return CaseResult(
        case,
        sheet["family"],
        len(errors),
        "least-squares tensors",
        max(errors.values()),
        not wrong,
        detail,
    )


def _read_sheet(path: Path) -> dict[str, Any]:
    try:
        sheet = json.loads(path.with_suffix(".json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path.with_suffix('.json')}: {error}") from error
    if not isinstance(sheet, dict):
        raise DataError(f"{path.with_suffix('.json')}: expected an object")
    return sheet
