"""The fields of a `config.json`, each of which must be read, known as harmless, or refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.config import RopeScaling

T = TypeVar("T")

# fmt: off
HARMLESS = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures",
    "attention_dropout", "auto_map", "bos_token_id", "cache_implementation",
    "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "is_decoder",
    "is_llama_config", "label2id", "max_length", "model_max_length", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "resid_pdrop", "return_dict", "sep_token_id", "sliding_window_size",
    "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unk_token_id", "use_bfloat16",
    "use_cache",
))
# fmt: on
"""Fields that do not change what a trained model computes."""
ROPE_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
    "original_max_position_embeddings": "original_max_positions",
}
"""Field of the rotary parameters -> field of `RopeScaling`."""
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


class Fields:
    """The fields of a JSON file; it knows which of them have been read."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        name: str = "config.json",
        harmless: Collection[str] = HARMLESS,
    ) -> None:
        """`name` is the file's name in errors; fields in `harmless` need not be read."""
        self._raw, self._name, self._read = raw, name, set(harmless)

    def get(self, name: str, default: T) -> T:
        """Return a field in the type of its default, or the default if it is absent or null.

        Raises `ConfigError` if it has another type.
        """
        self._read.add(name)
        value = self._raw.get(name)
        if value is None:
            return default
        kind = type(default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)  # type: ignore[return-value]
        if default is not None and type(value) is not kind:
            raise ConfigError(
                f"{self._name}: {name}: expected a {kind.__name__}, got {type(value).__name__}"
            )
        return value

    def skip(self, name: str) -> None:
        """Count a field as read: something else says the same."""
        self._read.add(name)

    def size(self, *names: str) -> int:
        """Return the first of several fields that is present.

        Raises `ConfigError` if none is, or if it is not a positive number.
        """
        for name in names:
            self._read.add(name)
            value = self._raw.get(name)
            if value is not None:
                if type(value) is not int or value <= 0:
                    raise ConfigError(
                        f"{self._name}: {name}: expected a positive number, got {value!r}"
                    )
                return value
        raise ConfigError(f"{self._name}: expected the field {names[0]}")

    def expect(self, name: str, *allowed: object) -> None:
        """Raise `ConfigError` unless a field is absent, null, or one of some values."""
        self._read.add(name)
        value = self._raw.get(name)
        if value is not None and value not in allowed:
            shown = " or ".join(map(repr, allowed)) or "none"
            raise ConfigError(f"{self._name}: {name}: expected {shown}, got {value!r}")

    def check_all_read(self) -> None:
        """Raise `ConfigError` naming the fields that nothing has read, unless they are null."""
        present = {name for name, value in self._raw.items() if value is not None}
        unread = sorted(
            n for n in present - self._read if not n.startswith(("unsloth", "_sliding"))
        )
        if unread:
            raise ConfigError(
                f"{self._name}: expected no field that this server does not know, as it could "
                f"change the answers; got {', '.join(unread[:10])}"
            )

    def rope(self, max_positions: int, layers: str | None = None) -> dict[str, Any]:
        """Return the rotary fields of `DecoderConfig`: base, rotary share and scaling.

        They are in `rope_parameters` (transformers 5, possibly by kind of `layers`), or in
        `rope_theta`, `rope_scaling` and `partial_rotary_factor`. Raises `ConfigError` for a scaling
        that is not supported.
        """
        for name in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"):
            self._read.add(name)
        raw = self._raw
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        if layers is not None and layers in rope:
            rope = dict(rope[layers])
        theta = rope.pop("rope_theta", raw.get("rope_theta") or 10_000.0)
        share = rope.pop("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)
        original = raw.get("original_max_position_embeddings")
        self._read.add("original_max_position_embeddings")
        if original is not None:
            rope.setdefault("original_max_position_embeddings", original)
        return {
            "rope_theta": float(theta),
            "share": float(share),
            "scaling": _read_scaling(rope, max_positions),
        }


def _read_scaling(rope: dict[str, Any], max_positions: int) -> RopeScaling | None:
    kinds = {rope.pop(name) for name in ("rope_type", "type") if name in rope}
    kind = next(iter(kinds), "default")
    if kind in ("su", "longrope"):
        kind = "longrope"
    if kind not in ROPE_KINDS or len(kinds) > 1:
        raise ConfigError(
            f"config.json: rope_type: expected {', '.join(ROPE_KINDS)}, got {sorted(kinds)}"
        )
    if kind == "default":
        return None
    if kind in ("yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", max_positions)
    scales = {name: rope.pop(name, None) for name in ("mscale", "mscale_all_dim")}
    ours = {ROPE_FIELDS.get(name, name): value for name, value in rope.items() if value is not None}
    if kind in ("yarn", "longrope"):
        ours.setdefault("factor", max_positions / ours["original_max_positions"])
        ours.setdefault("attention_factor", _attention_factor(kind, ours, scales))
    try:
        return RopeScaling(kind=kind, **ours)
    except ValueError as error:
        raise ConfigError(f"config.json: rope_scaling: {error}") from error


def _attention_factor(
    kind: str, scaling: Mapping[str, Any], scales: Mapping[str, float | None]
) -> float:
    """Return the factor of cosines and sines if the checkpoint does not state it."""
    factor = scaling["factor"]
    if kind == "longrope":
        original = scaling["original_max_positions"]
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, over = scales["mscale"], scales["mscale_all_dim"]
    return scale(mscale) / scale(over) if mscale and over else scale(1.0)
