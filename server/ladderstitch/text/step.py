"""What ranks run at once: fresh tokens of several sequences, and where their caches lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


class LogitsMode(IntEnum):
    """What a sequence needs of the logits of its fresh tokens."""

    NONE = 0
    BEST = 1  # the last one's likeliest token
    LAST = 2  # the last one's
    ALL = 3


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """Tokens of one sequence at positions `start`..; `blocks` of the cache hold all of it."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    want: LogitsMode = LogitsMode.BEST


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: every sequence on the same path."""

    runs: tuple[SequenceInput, ...]
    path: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(run.tokens) for run in self.runs)

    def pack(self) -> tuple[dict[str, Any], bytes]:
        """Header and body of a message."""
        header = {
            "path": self.path,
            "counts": [len(run.tokens) for run in self.runs],
            "starts": [run.start for run in self.runs],
            "blocks": [len(run.blocks) for run in self.runs],
            "wants": [int(run.want) for run in self.runs],
        }
        numbers = [n for run in self.runs for n in (*run.tokens, *run.blocks)]
        return header, np.array(numbers, np.int32).tobytes()

    @classmethod
    def unpack(cls, header: dict[str, Any], body: bytes | memoryview) -> Step:
        numbers = np.frombuffer(body, np.int32).tolist()
        counts, blocks = header["counts"], header["blocks"]
        sizes = [a + b for a, b in zip(counts, blocks, strict=True)]
        begins = [0, *accumulate(sizes)][:-1]
        runs = tuple(
            SequenceInput(
                numbers[at : at + n], start, numbers[at + n : at + n + m], LogitsMode(want)
            )
            for at, n, m, start, want in zip(
                begins, counts, blocks, header["starts"], header["wants"], strict=True
            )
        )
        return cls(runs, header["path"])


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What came of a step, in the order of its runs.

    `best` holds a token for every run that wanted the likeliest, `logits` [R, V] the rows of those
    that wanted logits.
    """

    best: Tokens
    logits: Logits


def aligned(
    tokens: Tokens, start: int, path: int, blocks_each: int, want: LogitsMode = LogitsMode.LAST
) -> Step:
    """Sequences of one length, tokens [B, T], each in blocks of its own, side by side."""
    return Step(
        tuple(
            SequenceInput(row.tolist(), start, range(i * blocks_each, (i + 1) * blocks_each), want)
            for i, row in enumerate(tokens)
        ),
        path,
    )
