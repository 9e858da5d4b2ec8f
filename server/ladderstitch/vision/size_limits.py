"""Limits of the numbers and lists in the configuration of a network."""

from __future__ import annotations

from typing import Any

MAX_SIZE = 1 << 20
"""Largest number in the configuration of a network."""
MAX_BLOCKS = 500
"""Largest depth of a network, or of a stage of it, in blocks."""
MAX_COST = 1 << 50
"""Largest number of multiply-accumulates or parameters in the configuration of a network."""
MAX_ENTRIES = 64
"""Entries of a list in the configuration of a network: anchors, stages."""
MAX_PAIRS = 4096
"""Entries of a list of stitched pairs, or of paths of a supernet."""


def check_sizes(value: Any, where: str) -> None:
    """Raise `ValueError` if a number or a list in a configuration exceeds any real network.

    `where` is the path of the value; numbers of blocks are under the names `depth` and `depths`.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_sizes(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        most = MAX_PAIRS if where.endswith(("_pairs", ".net.paths")) else MAX_ENTRIES
        if len(value) > most:
            raise ValueError(f"{where}: expected at most {most} entries, got {len(value)}")
        for inner in value:
            check_sizes(inner, where)
    elif isinstance(value, int | float):
        most = MAX_BLOCKS if where.endswith((".depth", ".depths")) else MAX_SIZE
        most = MAX_COST if where.endswith((".macs", ".parameters")) else most
        if not -most <= value <= most:
            raise ValueError(f"{where}: expected at most {most}, got {value}")
