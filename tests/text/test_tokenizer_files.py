"""The tokenizers of bundles as transformers reads them, from the folder alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ladderstitch.bundles import find_bundle
from ladderstitch.errors import BundleError
from ladderstitch.text.bundle import TextBundle, write_tokenizer
from ladderstitch.text.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG
from tests.support.language_models import TINY, write_byte_tokenizer, write_tiny

TEXT = "The  house was 'cold',\nnaïve 7 ☃."


def test_transformers_reads_the_tokenizer_of_the_embedded_bundle() -> None:
    bundle = TextBundle.load(find_bundle("elastic-text"))
    read = AutoTokenizer.from_pretrained(bundle.path)
    assert read.encode(TEXT) == bundle.tokenizer().encode(TEXT)
    assert read.eos_token_id == bundle.manifest.end_tokens[0]
    assert read.model_max_length == bundle.manifest.config.max_positions


def test_written_tokenizer_has_the_special_tokens_of_the_manifest(tmp_path: Path) -> None:
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny"))
    assert AutoTokenizer.from_pretrained(bundle.path).eos_token is None
    write_byte_tokenizer(tmp_path / "source.json")
    manifest = bundle.manifest.model_copy(update={"special_tokens": {"pad_token": "<end>"}})
    write_tokenizer(bundle.path, tmp_path / "source.json", manifest)
    read = AutoTokenizer.from_pretrained(bundle.path)
    assert read.encode(TEXT) == bundle.tokenizer().encode(TEXT)
    assert (read.eos_token, read.pad_token, read.bos_token) == ("<end>", "<end>", None)
    fields = json.loads((bundle.path / TOKENIZER_CONFIG).read_text())
    assert fields["model_max_length"] == TINY.max_positions


def test_damaged_tokenizer_is_refused_by_its_file(tmp_path: Path) -> None:
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny"))
    (bundle.path / TOKENIZER).write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        write_tokenizer(bundle.path, bundle.path / TOKENIZER, bundle.manifest)
    assert not (bundle.path / TOKENIZER_CONFIG).exists()
