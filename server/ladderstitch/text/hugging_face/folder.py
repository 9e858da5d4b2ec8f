"""A folder that `save_pretrained` wrote, as the manifest of a bundle.

config.json              the architecture; each field is used, known as harmless, or refused
*.safetensors, or pytorch_model*.bin
                         the weights, in one file or in shards with their index
tokenizer.json           the tokenizer
tokenizer_config.json, chat_template.jinja, generation_config.json
                         optional: special tokens, the chat template, end tokens
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ladderstitch.bundles.files import MAX_MANIFEST_BYTES, read_json, read_text
from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.text.hugging_face.architectures import Architecture, read_architecture

CONFIG = "config.json"
MAX_NAME = 63
DEFAULT_TEMPLATE = "default"


def read_folder(folder: Path) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture of a folder, and the other fields of a manifest.

    Raises `BundleError` naming the file and the field that is missing, wrong or not supported.
    """
    file = folder / CONFIG
    raw = _read_object(file)
    try:
        architecture = read_architecture(raw)
    except ConfigError as error:
        raise BundleError(f"{folder}: {error}") from error
    file_of_defaults = folder / "generation_config.json"
    defaults = _read_object(file_of_defaults) if file_of_defaults.exists() else {}
    ends = defaults.get("eos_token_id")
    fields = {
        "name": _name_of(folder),
        "end_tokens": _end_tokens(raw.get("eos_token_id") if ends is None else ends, file),
        "chat_template": _read_template(folder),
        "sampling": _read_sampling(defaults),
        "origin": f"folder {folder.resolve().name}",
        "licence": "unknown",
    }
    return architecture, fields


def _name_of(folder: Path) -> str:
    """Return the folder's name in the characters that a model's name may have."""
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._")
    return name[:MAX_NAME] or "model"


def _end_tokens(value: object, file: Path) -> tuple[int, ...]:
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in tokens):
        raise BundleError(f"{file}: eos_token_id: expected a number or a list, got {value!r}")
    return tuple(tokens)


def _read_sampling(defaults: dict[str, Any]) -> dict[str, Any]:
    """Return what the model's authors recommend if they recommend sampling at all."""
    if not defaults.get("do_sample"):
        return {}
    names = ("temperature", "top_k", "top_p")
    return {name: defaults[name] for name in names if defaults.get(name) is not None}


def _read_template(folder: Path) -> str | None:
    """Return the chat template: of its own file, or of the tokenizer's configuration."""
    own, file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.exists():
        return read_text(own, MAX_MANIFEST_BYTES)
    if not file.exists():
        return None
    template = _read_object(file).get("chat_template")
    if isinstance(template, list):  # several templates by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get(DEFAULT_TEMPLATE)
    if template is not None and not isinstance(template, str):
        raise BundleError(f"{file}: chat_template: expected a text or a list of named texts")
    return template


def _read_object(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(read_json(file))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: {error}") from error
    if not isinstance(fields, dict):
        raise BundleError(f"{file}: expected an object, got {type(fields).__name__}")
    return fields
