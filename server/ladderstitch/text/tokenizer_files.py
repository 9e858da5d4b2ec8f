"""The files of a tokenizer in a bundle, which programs of other projects read, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from ladderstitch.bundles.files import read_json
from ladderstitch.errors import BundleError

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKEN_FILES = ("special_tokens_map.json", TOKENIZER_CONFIG)
"""Files of a checkpoint that name its special tokens; the second has priority."""
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers that reads any `tokenizer.json`."""


def copy_special_token_files(source: Path, into: Path) -> None:
    """Copy the files that name special tokens from one folder to another, if it has any."""
    for name in SPECIAL_TOKEN_FILES:
        if (file := source / name).exists():
            shutil.copyfile(file, into / name)


def write_tokenizer_config(
    folder: Path, special_tokens: Mapping[str, str], max_positions: int
) -> None:
    """Write what `AutoTokenizer` of transformers needs besides `tokenizer.json`.

    Without it, version 4 refuses the folder, and version 5 knows no special tokens.
    `special_tokens` are by their names, such as `eos_token`; `max_positions` is the longest text
    that the model takes, in tokens.
    """
    fields: dict[str, object] = {
        "tokenizer_class": TOKENIZER_CLASS,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(fields | dict(special_tokens), indent=1, ensure_ascii=False)
    (folder / TOKENIZER_CONFIG).write_text(text + "\n")


def read_special_tokens(folder: Path) -> dict[str, str | None]:
    """Return the special tokens that the files of a folder name; none without such files.

    Raises `BundleError` if a file is not valid.
    """
    found: dict[str, str | None] = {}
    for name in SPECIAL_TOKEN_FILES:
        found |= _read_file(folder / name)
    return found


def _read_file(file: Path) -> dict[str, str | None]:
    """Return the special tokens of a file of transformers, by name; none if it does not exist."""
    if not file.exists():
        return {}
    try:
        fields = json.loads(read_json(file))
        named = {name: value for name, value in fields.items() if name.endswith("_token")}
        texts = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BundleError(f"{file}: expected an object with special tokens: {error}") from error
    return {k: v for k, v in texts.items() if v is None or isinstance(v, str)}
