"""The `network_def` of ViT-ResNAS: a network as a list of its blocks, in upstream's form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError

from ladderstitch.errors import ConfigError

STEM_WIDTH = 24
"""Channels of the convolutions before the patches where a definition states none."""
Embedding = tuple[Literal[0, 4], PositiveInt] | tuple[Literal[5], PositiveInt, PositiveInt]
"""Patches as they are (0), after convolutions (4), or after convolutions of stated width (5)."""
Attention = tuple[PositiveInt, PositiveInt, PositiveInt]
"""Width of the tokens, heads, size of a head."""
Block = tuple[Literal[1], Attention, tuple[PositiveInt, PositiveInt], Literal[0, 1]]
"""Attention, then width of the tokens and hidden width, then whether the block runs."""
Reduction = tuple[Literal[3], PositiveInt, PositiveInt]
Head = tuple[Literal[2], PositiveInt, PositiveInt]
FORMS = (
    "(0 or 4, width) or (5, width, stem), then (1, (width, heads, size), (width, hidden), 0 or 1) "
    "or (3, width, new width), at last (2, width, classes)"
)
MAX_CHARACTERS = 20_000

_Entries = TypeAdapter[Any](
    Annotated[list[Embedding | Block | Reduction | Head], Field(min_length=2)]
)


@dataclass(frozen=True, slots=True)
class NetworkDef:
    """A network: widths and blocks of its stages, and sizes of all blocks in their order."""

    stem_width: int | None
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    hidden: tuple[int, ...]
    runs: tuple[bool, ...]
    num_classes: int


def read_network_def(field: str, value: object) -> NetworkDef:
    """Return a network from lists or from the text that upstream's scripts print.

    Raises `ConfigError` that begins with `field` if it has another form, or if the widths of two
    entries do not fit.
    """
    first, *middle, last = _read_entries(field, value)
    if first[0] not in (0, 4, 5) or last[0] != 2:
        raise ConfigError(f"{field}: expected {FORMS}, got {first} at first and {last} at last")
    widths, depths = [first[1]], [0]
    blocks = []
    for number, entry in enumerate([*middle, last], 1):
        read = (entry[1][0], entry[2][0]) if entry[0] == 1 else (entry[1],)
        if entry[0] not in (1, 3) and entry is not last:
            raise ConfigError(f"{field}[{number}]: expected a block or a reduction, got {entry}")
        if wrong := [width for width in read if width != widths[-1]]:
            raise ConfigError(f"{field}[{number}]: expected width {widths[-1]}, got {wrong[0]}")
        if entry[0] == 1:
            blocks.append((entry[1][1], entry[1][2], entry[2][1], bool(entry[3])))
            depths[-1] += 1
        elif entry[0] == 3:
            widths.append(entry[2])
            depths.append(0)
    if not all(depths):
        raise ConfigError(f"{field}: expected blocks in every stage, got {depths}")
    heads, sizes, hidden, runs = zip(*blocks, strict=True)
    stem = {0: None, 4: STEM_WIDTH}.get(first[0], first[-1])
    return NetworkDef(stem, tuple(widths), tuple(depths), heads, sizes, hidden, runs, last[2])


def _read_entries(field: str, value: object) -> list[Any]:
    """Return the entries, each in a known form."""
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            raise ConfigError(f"{field}: expected at most {MAX_CHARACTERS} characters")
        try:
            value = json.loads(value.replace("(", "[").replace(")", "]"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{field}: expected {FORMS}, got text that is none") from error
    try:
        return list(_Entries.validate_python(value))
    except ValidationError as error:
        place = error.errors()[0]["loc"][:1]
        if isinstance(value, list | tuple) and place and isinstance(place[0], int):
            field, value = f"{field}[{place[0]}]", value[place[0]]
        raise ConfigError(f"{field}: expected {FORMS}, got {value!r:.80}") from error
