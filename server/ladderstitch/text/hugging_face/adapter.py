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

from torch import Tensor

from ladderstitch.bundles.files import read_json
from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.text.hugging_face.fields import Fields
from ladderstitch.text.model.weight_reader import DOWN, UP, load_delta

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HARMLESS = (
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "layer_replication",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
)
"""Fields of `adapter_config.json` that the tensors already reflect, or that concern training."""


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
    for name in ("modules_to_save", "target_parameters", "arrow_config", "corda_config"):
        fields.expect(name)
    for name in ("r", "rank_pattern"):  # the tensors have their ranks
        fields.skip(name)
    alphas: dict[str, Any] = fields.get("alpha_pattern", {})
    scale = _Scale(fields.get("lora_alpha", 8.0), alphas, by_root=fields.get("use_rslora", False))
    fields.check_all_read()
    for alpha in (scale.alpha, *alphas.values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ConfigError(f"{CONFIG}: lora_alpha: expected finite numbers, got {alpha!r}")
    return scale
