"""Bounded reading of a bundle's files: their size and depth are checked before their content."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from ladderstitch.errors import BundleError, shorten

if TYPE_CHECKING:
    import yaml  # imported when a file is read: the help page needs none

MAX_MANIFEST_BYTES = 1 << 20
MAX_TABLE_BYTES = 1 << 20
"""Size of `quality.json` and of `latency.json`."""
MAX_INDEX_BYTES = 16 << 20
"""Size of other JSON files, such as the index of shards."""
MAX_TOKENIZER_BYTES = 64 << 20
MAX_NODES = 50_000
"""Values, keys and collections of a manifest after its aliases are expanded."""
MAX_TABLE_PARTS = 50_000
"""Texts and brackets of `quality.json` or `latency.json`: ten for each of up to 5,000 variants."""
MAX_DEPTH = 40
"""Nested collections of a manifest or of a JSON file."""
MAX_NUMBER_CHARACTERS = 40
"""Characters of a number: an integer of a manifest is below 2^63, a float has 17 digits."""
MAX_INTEGER = 1 << 63
MAX_HEADER_BYTES = 16 << 20
"""Size of the header of a safetensors file; a model of 70B parameters has 0.1 MB."""
MAX_ERROR_BYTES = 4000

JSON_BRACKET_OR_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
LONG_NUMBER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|[0-9.][-+0-9_.:eE]*)")

Model = TypeVar("Model", bound=BaseModel)


def read_text(path: Path, max_bytes: int) -> str:
    """Return the text of a regular file.

    Raises `BundleError` if the file cannot be read, has more than `max_bytes` or is not UTF-8.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BundleError(f"{path}: expected a regular file")
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            size = max(path.stat().st_size, len(data))
            raise BundleError(f"{path}: expected at most {max_bytes} bytes, got {size}")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: {error}") from error


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises `BundleError` if the file cannot be read, is malformed, is too deep, or has too many
    values after aliases are expanded, or a number that is too long.
    """
    import yaml

    # the loader of LibYAML is ten times as fast as Python's
    loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = read_text(path, MAX_MANIFEST_BYTES)
    try:
        _check_events(yaml.parse(text, loader))
        content = yaml.load(text, loader)
        _check_integers(content)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError) as error:
        raise BundleError(f"{path}: {shorten(str(error), MAX_ERROR_BYTES)}") from error
    return content


def _check_events(events: Iterable[yaml.Event]) -> None:
    """Raise `ValueError` if a YAML text is too large or too deep when its aliases are expanded.

    Aliases count as what they stand for, so that ten lines cannot become a billion values.
    """
    import yaml

    sizes: dict[str, int] = {}
    open_anchors: list[tuple[str | None, int]] = []
    nodes = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor}: expected an anchor that is complete before it")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_anchors.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            _check_number(event)
        if nodes > MAX_NODES:
            raise ValueError(f"expected at most {MAX_NODES} values, got more")
        if len(open_anchors) > MAX_DEPTH:
            raise ValueError(f"expected at most {MAX_DEPTH} nested levels, got more")


def _check_number(event: yaml.ScalarEvent) -> None:
    """Raise `ValueError` for a scalar that is a number of too many digits."""
    may_be_number = event.implicit[0] or event.tag is not None
    if len(event.value) <= MAX_NUMBER_CHARACTERS or not may_be_number:
        return
    if LONG_NUMBER.fullmatch(event.value):
        raise ValueError(
            f"expected a number of at most {MAX_NUMBER_CHARACTERS} characters, got "
            f"{len(event.value)}: {event.value[:20]}..."
        )


def _check_integers(content: Any) -> None:
    """Raise `ValueError` if an integer does not have 64 bits; `content` is not deep."""
    if isinstance(content, dict):
        for key, value in content.items():
            _check_integers(key)
            _check_integers(value)
    elif isinstance(content, list | tuple | set):
        for value in content:
            _check_integers(value)
    elif isinstance(content, int) and abs(content) >= MAX_INTEGER:
        raise ValueError("expected integers of at most 64 bits, got a larger one")


def validate(path: Path, kind: type[Model], content: Any) -> Model:
    """Return the model of a file's content; raises `BundleError` that lists the first problems."""
    try:
        return kind.model_validate(content)
    except (ValidationError, ValueError, OverflowError, RecursionError) as error:
        raise BundleError(f"{path}: {shorten(str(error), MAX_ERROR_BYTES)}") from error


def read_table(path: Path, kind: type[Model]) -> Model:
    """Return the model in a JSON file; raises `BundleError` if it cannot be read or is not one."""
    text = read_text(path, MAX_TABLE_BYTES)
    check_json_depth(text, path, MAX_TABLE_PARTS)
    try:
        return kind.model_validate_json(text)
    except (ValidationError, ValueError, OverflowError, RecursionError) as error:
        raise BundleError(f"{path}: {shorten(str(error), MAX_ERROR_BYTES)}") from error


def read_json(path: Path, max_bytes: int = MAX_INDEX_BYTES) -> str:
    """Return the text of a JSON file; raises `BundleError` if it is too large or too deep."""
    text = read_text(path, max_bytes)
    check_json_depth(text, path)
    return text


def check_json_depth(text: str, path: Path, max_parts: int | None = None) -> None:
    """Raise `BundleError` if a JSON text nests more than `MAX_DEPTH` lists and objects.

    With `max_parts`, it may also have only this number of texts and brackets.
    """
    depth = 0
    for count, match in enumerate(JSON_BRACKET_OR_STRING.finditer(text)):
        if max_parts is not None and count >= max_parts:
            raise BundleError(f"{path}: expected at most {max_parts} texts and brackets, got more")
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            raise BundleError(f"{path}: expected at most {MAX_DEPTH} nested levels, got more")


def check_safetensors(path: Path) -> None:
    """Raise `BundleError` if the header of a safetensors file is too large for a real model."""
    try:
        if not path.is_file():
            raise BundleError(f"{path}: expected a file, got none")
        with path.open("rb") as file:
            prefix, size = file.read(8), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BundleError(f"{path}: {error}") from error
    if len(prefix) < 8:
        raise BundleError(f"{path}: expected a safetensors file, got {size} bytes")
    (header,) = struct.unpack("<Q", prefix)
    if header > min(MAX_HEADER_BYTES, size - 8):
        raise BundleError(
            f"{path}: expected a header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes, got "
            f"{header}"
        )
