"""Extreme and odd numbers and texts that mutations of every format draw from."""

from __future__ import annotations

import math
import random

FLOATS = (
    math.nan,
    math.inf,
    -math.inf,
    -0.0,
    0.0,
    5e-324,
    1e-30,
    0.5,
    1.0,
    math.nextafter(1.0, 2.0),
    -1.0,
    100.0,
    101.0,
    3.5e38,
    1.7e308,
    -1.7e308,
)
TEXTS = (
    "",
    " ",
    "0",
    "-1",
    "nan",
    "inf",
    "1e999",
    "latest",
    "\0",
    "a\0b",
    "\n",
    "\u202e\u0301\u0301",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\ufeff",
    "\uffff",
    "../../etc/passwd",
    "{{ 7 * 7 }}",
    "%s%n",
    "<|endoftext|>",
)
LONG_LENGTHS = (128, 129, 255, 300, 1000, 5000)
VERY_LONG = 70_000
SHARE_OF_VERY_LONG = 0.02


def draw_integer(rng: random.Random, low: int, high: int) -> int:
    """Return a number from `low` to `high`, mostly near an end, zero, or a power of two."""
    near = 2 ** rng.randint(0, 64) * rng.choice((-1, 1)) + rng.randint(-1, 1)
    drawn = rng.choice((0, 1, -1, 2, 3, low, low + 1, high, high - 1, near, near))
    return min(max(drawn, low), high)


def draw_float(rng: random.Random) -> float:
    """Return a number that is not finite, extreme or ordinary."""
    return rng.choice(FLOATS) if rng.random() < 0.8 else rng.uniform(-2, 2)


def draw_text(rng: random.Random) -> str:
    """Return an odd or a long text that has an encoding in UTF-8."""
    kind = rng.random()
    if kind < SHARE_OF_VERY_LONG:
        return rng.choice("aé ") * VERY_LONG
    if kind < 0.2:
        return rng.choice("xß \u4e2d") * rng.choice(LONG_LENGTHS)
    if kind < 0.35:
        return "".join(chr(rng.randint(1, 0xD7FF)) for _ in range(rng.randint(1, 30)))
    return rng.choice(TEXTS)
