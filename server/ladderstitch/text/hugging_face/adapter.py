"""Low-rank adapters (LoRA, arXiv 2106.09685) of PEFT, as deltas of a bundle.

adapter_config.json        rank, scale, and the kind of adapter
adapter_model.safetensors  NAME.lora_A.weight [r, K] and NAME.lora_B.weight [N, r]
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladderstitch.bundles.files import read_json
from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.text.hugging_face.fields import Fields
from ladderstitch.text.model.layout import LaidOutWeights
from ladderstitch.text.model.weight_reader import DOWN, HEAD, UP, check_delta, load_delta

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# fmt: off
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "velora_config",
)
"""Fields of `adapter_config.json` that the tensors already reflect, or that concern training."""
OTHER_KINDS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
    "modules_to_save", "monteclora_config", "target_parameters", "use_bdlora",
)
# fmt: on
"""Fields that make an adapter more than additions to some matrices."""
BASE_KEEPING = (True, False, "gaussian", "eva", "orthogonal")
"""The initial factors of adapters that are trained on unchanged base weights."""


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Return an adapter as a delta, `NAME.up` [N, r] and `NAME.down` [r, K] by tensor.

    The scale is part of `up`. Raises `BundleError` naming the file and the field for adapters of
    other kinds, and for tensors without a partner.
    """
    try:
        scale = _read_scale(folder / CONFIG)
    except ConfigError as error:
        raise BundleError(f"{folder}: {error}") from error
    stored = load_delta(folder / WEIGHTS)
    delta: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        base, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
        if not base or kind not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise BundleError(
                f"{folder / WEIGHTS}: expected tensors NAME.lora_A.weight and NAME.lora_B.weight, "
                f"got {name}"
            )
        if kind == "A.weight":
            delta[f"{base}.weight{DOWN}"] = tensor.float().contiguous()
        else:
            delta[f"{base}.weight{UP}"] = scale(base, tensor.shape[1]) * tensor.float()
    return delta


def lay_out(delta: Mapping[str, Tensor], weights: LaidOutWeights) -> dict[str, Tensor]:
    """Return a delta of stored tensors as one of the tensors under Llama's names.

    A fused matrix has one `down` and the rows of `up` of each of its parts, in their order and
    scale. Raises `BundleError` naming the factors that do not fit a stored matrix.
    """
    stored = {part.name: weights.stored_shape(part.name) for part in weights.parts.values()}
    if HEAD in weights.parts and HEAD not in stored:  # a module may have a newer name than its file
        delta = {name.replace(HEAD, weights.parts[HEAD].name): f for name, f in delta.items()}
    check_delta(delta, stored)
    found = {}
    for name, part in weights.parts.items():
        if (up := delta.get(part.name + UP)) is not None:
            rows = up if part.rows is None else up[torch.from_numpy(part.rows)]
            found[name + UP] = (part.factor * rows).contiguous()
            found[name + DOWN] = delta[part.name + DOWN].clone()
    return found


@dataclass(frozen=True, slots=True)
class _Scale:
    """The factor of an adapter's product: alpha over the rank, or over its root (rsLoRA)."""

    alpha: float
    alphas: Mapping[str, float]
    """The alpha of modules whose name ends in a pattern."""
    by_root: bool

    def __call__(self, module: str, rank: int) -> float:
        own = [a for part, a in self.alphas.items() if f".{module}".endswith(f".{part}")]
        alpha = own[-1] if own else self.alpha
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _read_scale(file: Path) -> _Scale:
    try:
        raw = json.loads(read_json(file))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: {error}") from error
    if not isinstance(raw, dict):
        raise BundleError(f"{file}: expected an object, got {type(raw).__name__}")
    fields = Fields(raw, name=CONFIG, harmless=HARMLESS)
    fields.expect("peft_type", "LORA")
    fields.expect("task_type", "CAUSAL_LM")
    fields.expect("bias", "none")
    for name in (
        "use_dora",
        "fan_in_fan_out",
        "lora_bias",
        "use_qalora",
        "trainable_token_indices",
    ):
        fields.expect(name, False)
    for name in OTHER_KINDS:
        fields.expect(name)
    fields.expect("init_lora_weights", *BASE_KEEPING)
    for name in ("r", "rank_pattern"):  # the tensors have their ranks
        fields.skip(name)
    alphas: dict[str, Any] = fields.get("alpha_pattern", {})
    scale = _Scale(fields.get("lora_alpha", 8.0), alphas, by_root=fields.get("use_rslora", False))
    fields.check_all_read()
    for alpha in (scale.alpha, *alphas.values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ConfigError(f"{CONFIG}: lora_alpha: expected finite numbers, got {alpha!r}")
    return scale
