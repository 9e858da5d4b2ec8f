"""Bundles whose files would explode while they are read or checked are rejected at once."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ladderstitch.bundles import is_language_bundle
from ladderstitch.bundles.files import MAX_DEPTH, MAX_NODES, check_json_depth, read_yaml
from ladderstitch.errors import BundleError
from ladderstitch.text.bundle import TextBundle
from ladderstitch.vision.bundle import VisionBundle
from tests.support.language_models import write_tiny

MAX_MESSAGE = 6000
CPU_S = 60.0
"""Processor time of a rejection, which is 0.2 s at most; an explosion takes minutes."""


def laughs(levels: int = 12) -> str:
    """Return a YAML text that expands tenfold with each level."""
    lines = ["l0: &l0 [ha, ha]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int = 12) -> str:
    """Return a YAML text whose merge keys expand tenfold with each level."""
    lines = ["m0: &m0 {a: 1, b: 2}"]
    lines += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


MANIFESTS: dict[str, str] = {
    "aliases": laughs(),
    "aliases in labels": laughs() + "\nlabels: *l11",
    "merge keys": merges(),
    "cycle": "labels: &a [*a]",
    "cycle of mappings": "config: &a {inner: {again: *a}}",
    "lists in lists": "labels: " + "[" * 100_000,
    "closed lists in lists": "labels: " + "[" * 5000 + "]" * 5000,
    "mappings in mappings": "config: " + "{a: " * 100_000,
    "block sequences": "labels:\n" + "- " * 50_000 + "x",
    "many labels": "labels: [" + "a, " * (MAX_NODES + 1) + "a]",
    "large file": "origin: " + "x" * (2 << 20),
    "decimal integer": "format: " + "9" * 100_000,
    "hexadecimal integer": "format: 0x" + "f" * 100_000,
    "sexagesimal integer": "format: 1" + ":59" * 10_000,
    "tagged integer": 'format: !!int "' + "9" * 100_000 + '"',
    "integer of 40 digits": "format: " + "9" * 40,
    "date that does not exist": "version: 2001-99-99",
    "key that is a list": "? [a, b]\n: c",
    "long unknown field": "a" * 100_000 + ": 1",
    "many unknown fields": "\n".join(f"field{n}: 1" for n in range(10_000)),
    "object of Python": "origin: !!python/object/apply:os.system [exit]",
    "empty": "",
    "a list": "[1, 2]",
    "a NUL": "origin: \0",
}


def check_rejected(load: Callable[[], object]) -> str:
    """Check that a bundle is rejected in little processor time; return the message."""
    started = time.process_time()
    with pytest.raises(BundleError) as rejected:
        load()
    assert time.process_time() - started < CPU_S
    message = str(rejected.value)
    assert len(message.encode()) < MAX_MESSAGE
    return message


@pytest.fixture(params=["vision", "text"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], object]:
    """Return a function that loads a valid bundle in `tmp_path`, of each kind in turn."""
    if request.param == "text":
        write_tiny(tmp_path)
        return lambda: TextBundle.load(tmp_path).tokenizer()
    from tests.conftest import make_tiny_bundle

    make_tiny_bundle(tmp_path)
    return lambda: VisionBundle.load(tmp_path).load_model()


@pytest.mark.parametrize("name", MANIFESTS)
def test_load_manifest_that_explodes_is_rejected(
    name: str, load: Callable[[], object], tmp_path: Path
) -> None:
    load()
    (tmp_path / "model.yaml").write_text(MANIFESTS[name])
    assert "model.yaml" in check_rejected(load)


@pytest.mark.parametrize("text", [laughs(), MANIFESTS["lists in lists"], "9" * 40])
def test_is_language_bundle_rejects_what_explodes(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(text)
    check_rejected(lambda: is_language_bundle(tmp_path))


def test_read_yaml_keeps_aliases_and_long_texts(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    digest = "0123456789abcdef" * 4
    path.write_text(f"a: &a [x, y]\nb: *a\nsha: {digest}\nquoted: '{'9' * 64}'\nc: 1e3\n")
    assert read_yaml(path) == {
        "a": ["x", "y"],
        "b": ["x", "y"],
        "sha": digest,
        "quoted": "9" * 64,
        "c": "1e3",
    }


SIZES: dict[str, dict[str, Any]] = {
    "vision": {
        "depth": {"anchors": [{"embed_dim": 8, "depth": 10**9, "num_heads": 2, "patch_size": 4}]},
        "width": {"anchors": [{"embed_dim": 10**12, "depth": 3, "num_heads": 2, "patch_size": 4}]},
        "anchors": {
            "anchors": [{"embed_dim": 8, "depth": 400, "num_heads": 2, "patch_size": 4}] * 1000
        },
    },
    "text": {"layers": {"layers": 10**9}, "vocab_size": {"vocab_size": 10**15}},
}


@pytest.mark.parametrize("name", ["depth", "width", "anchors", "layers", "vocab_size"])
def test_load_config_of_enormous_sizes_is_rejected(
    name: str, load: Callable[[], object], tmp_path: Path
) -> None:
    path = tmp_path / "model.yaml"
    fields = yaml.safe_load(path.read_text())
    changes = SIZES["text" if "layers" in fields["config"] else "vision"].get(name)
    if changes is None:
        pytest.skip("a field of the other kind of bundle")
    path.write_text(yaml.safe_dump(fields | {"config": fields["config"] | changes}))
    assert "config" in check_rejected(load)


TABLES: dict[str, str] = {
    "lists in lists": "[" * 100_000 + "]" * 100_000,
    "objects in objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "large file": '{"data": "' + "x" * (2 << 20) + '"}',
    "enormous integer": '{"n": ' + "9" * 1_000_000 + "}",
    "enormous key": '{"variants": {"' + "9" * 1_000_000 + '": {}}}',
    "unknown variants": json.dumps({"variants": {str(n): {} for n in range(50_000)}}),
    "unterminated text": '"' + '\\"' * 500_000,
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("file", ["quality.json", "latency.json"])
def test_load_table_that_explodes_is_rejected(
    file: str, name: str, load: Callable[[], object], tmp_path: Path
) -> None:
    if file == "latency.json" and not (tmp_path / file).exists():
        pytest.skip("language models have no latency.json")
    (tmp_path / file).write_bytes(TABLES[name].encode(errors="surrogateescape"))
    assert file in check_rejected(load)


def test_load_table_that_is_a_pipe_is_rejected(load: Callable[[], object], tmp_path: Path) -> None:
    (tmp_path / "quality.json").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "quality.json")
    assert "quality.json" in check_rejected(load)


def test_check_json_depth_ignores_brackets_in_texts() -> None:
    check_json_depth(json.dumps({"a": "[" * 1000 + '"' + "{" * 1000}), Path("a.json"))
    check_json_depth("[" * MAX_DEPTH + "]" * MAX_DEPTH, Path("a.json"))
    with pytest.raises(BundleError, match="nested levels"):
        check_json_depth("[" * (MAX_DEPTH + 1), Path("a.json"))


def deep_header() -> bytes:
    header = b'{"a":' * 100_000
    return struct.pack("<Q", len(header)) + header


HEADERS: dict[str, bytes] = {
    "larger than the file": struct.pack("<Q", 1 << 62) + b"{}",
    "larger than real ones": struct.pack("<Q", 64 << 20) + b" " * (64 << 20) + b"x",
    "deep": deep_header(),
    "short file": b"abc",
    "empty file": b"",
    "not JSON": struct.pack("<Q", 2) + b"{x",
}


@pytest.mark.parametrize("name", HEADERS)
def test_load_weights_with_wrong_header_are_rejected(
    name: str, load: Callable[[], object], tmp_path: Path
) -> None:
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(HEADERS[name])
    assert weights.name in check_rejected(load)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{}", "x" * (65 << 20), '{"model": ' + '{"a":' * 10_000],
    ids=["deep", "empty", "large", "deep model"],
)
def test_load_tokenizer_that_explodes_is_rejected(text: str, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    message = check_rejected(lambda: TextBundle.load(tmp_path).tokenizer())
    assert "tokenizer.json" in message
