"""A decoder over ranks whose sums cross stitches in flight, compared with one rank in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ladderstitch_kernels.decoder import DecoderShape, LayerWeights, Scheme, random_layers
from ladderstitch_kernels.stream import random_stitch
from tests.system.kernels.mutants import Mutant, imported_mutant
from tests.system.kernels.ranks import Delay, RankContext, detect, run_ranks
from tests.system.kernels.test_decoder import assert_ranks_match, attention, error, mlp

NARROW, WIDE = 24, 48
UP_DOWN, DOWN_UP = (NARROW, WIDE, WIDE, NARROW), (WIDE, NARROW, WIDE)
"""The widths of the parts of a stitched decoder, each of one layer."""
SHAPE = DecoderShape(layers=1, width=NARROW, heads=4, kv_heads=4, head_dim=8, ffn=44)
ROWS = 2
SLOTS = 4


def part_layers(widths: Sequence[int]) -> list[LayerWeights]:
    """Return the random layer of each part."""
    return [
        next(random_layers(replace(SHAPE, width=width), seed, torch.float32, "cpu"))
        for seed, width in enumerate(widths)
    ]


def inputs(widths: Sequence[int], tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(tokens, ROWS, widths[0], generator=generator)


def decode(
    context: RankContext, widths: tuple[int, ...], scheme: Scheme, tokens: int
) -> tuple[np.ndarray, list[int]]:
    """Decode `tokens` tokens with a part of each width, and stitches in between.

    Return this rank's stream after each token, [tokens, ROWS, D], and for each slot the number of
    columns that were written in the first step.
    """
    from ladderstitch_kernels import Exchange, SharedMapping
    from ladderstitch_kernels.decoder import Decoder, shard_layer, stitched_step
    from ladderstitch_kernels.stream import random_stitch

    parts = []
    for width, layer in zip(widths, part_layers(widths), strict=True):
        shape = replace(SHAPE, width=width)
        shard = shard_layer(layer, shape, context.rank, context.ranks)
        parts.append(Decoder(shape.shard(context.ranks), [shard], ROWS, tokens))
    stitches = [
        random_stitch(front, end, seed, torch.float32, "cpu")
        for seed, (front, end) in enumerate(pairwise(widths))
    ]
    memory = SharedMapping(context.folder, context.rank, context.ranks)
    exchange = Exchange(memory, ROWS, max(widths), torch.float32, columns=32)
    exchange.slots.local.fill_(float("nan"))
    context.barrier.wait()
    streams, columns = [], []
    for x in inputs(widths, tokens):
        streams.append(stitched_step(parts, stitches, x, exchange, scheme))
        if not columns:
            context.barrier.wait()
            written = exchange.slots.local.isfinite().flatten(2).sum(-1) // ROWS
            columns = written.amax(1).tolist()
            context.barrier.wait()
    return torch.stack(streams).numpy(), columns


def whole_model(widths: Sequence[int], scheme: Scheme, tokens: int) -> Tensor:
    """Return the streams by the definition, in float64, [tokens, ROWS, D].

    There is one rank, and the complete stream is mapped. For a ladder, a stitch also maps the
    stream before the last sub-block, which the next one reads.
    """
    before = last = inputs(widths, tokens).double().transpose(0, 1)  # [B, T, D]
    for seed, layer in enumerate(part_layers(widths)):
        if seed:
            front, end = widths[seed - 1], widths[seed]
            weight, bias = random_stitch(front, end, seed - 1, torch.float32, "cpu")
            before, last = (x @ weight.double().T + bias.double() for x in (before, last))
        for block in (attention, mlp):
            read = before if scheme == "ladder" else last
            before, last = last, last + block(layer, read)
    return last.transpose(0, 1)


def columns_sent(widths: Sequence[int]) -> list[int]:
    """Return the largest number of columns that one step sends through each slot.

    A sum that crosses a stitch is sent in the smaller of both widths.
    """
    sent = [(front, min(front, end)) for front, end in pairwise(widths)] + [(widths[-1],) * 2]
    by_epoch = [width for pair in sent for width in pair]
    slots = [0] * SLOTS
    for epoch, width in enumerate(by_epoch, start=1):
        slots[epoch % SLOTS] = max(slots[epoch % SLOTS], width)
    return slots


def largest_error(context: RankContext, widths: tuple[int, ...], tokens: int = 1) -> float:
    """Return the error of a ladder; infinite if it sends other widths than it should."""
    streams, columns = decode(context, widths, "ladder", tokens)
    if columns != columns_sent(widths):
        return float("inf")
    worst = error(streams, whole_model(widths, "ladder", tokens))
    return float(np.nan_to_num(worst, nan=np.inf))


EVERYWHERE = tuple(
    Delay(access, ranks=(0, 1, 2, 3), chance=0.02, seconds=0.004)
    for access in ("load", "store", "atomic")
)


@pytest.mark.parametrize(
    ("widths", "scheme", "ranks", "tokens"),
    [
        (DOWN_UP, "ladder", 4, 2),
        *(
            pytest.param(widths, scheme, ranks, 8, marks=pytest.mark.slow)
            for widths in (UP_DOWN, DOWN_UP)
            for scheme in ("ladder", "standard")
            for ranks in (2, 4)
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_stitched_decoder_over_ranks_matches_definition(
    widths: tuple[int, ...], scheme: Scheme, ranks: int, tokens: int
) -> None:
    found = run_ranks(decode, ranks, widths, scheme, tokens, delays=EVERYWHERE)
    assert_ranks_match([streams for streams, _ in found], whole_model(widths, scheme, tokens))
    assert [columns for _, columns in found] == [columns_sent(widths)] * ranks


STREAM, STITCH, SPLIT_PHASE = "stream", "ops/stitch_linear", "comm/split_phase"
SEND = "post(partial, self._exchange)\n            self._in_flight.append(None)\n"
MAP_AND_SEND = "self._x, partial = stitch_pending(self.drain(), partial, *stitch)\n"
SQUARE = "stitch.weight.shape[0] == stitch.weight.shape[1]"
WRONG_CROSSINGS = {
    "bias from every rank": Mutant(STITCH, (("tl.where(biased, 1.0, 0.0) * shift", "shift"),)),
    "bias on arrival, too": Mutant(
        STREAM,
        (("return stitch_linear(total, stitch.weight)", "return stitch_linear(total, *stitch)"),),
    ),
    "mapped when sent and on arrival": Mutant(
        STREAM,
        (
            (
                "gemv_post(x, weight, self._exchange)\n            self._x = stitch",
                f"gemv_post(x, stitch.weight @ weight if {SQUARE} else weight, self._exchange)\n"
                "            self._x = stitch",
            ),
        ),
    ),
    "part in the stream and in the sum": Mutant(
        STREAM, (("stitch_pending(self.drain(), p", "stitch_pending(self.drain() + partial, p"),)
    ),
    "mapped on the wrong side": Mutant(
        STREAM, (("shape[0] < self.weight.shape[1]", "shape[0] > self.weight.shape[1]"),)
    ),
    "sent without the map": Mutant(
        STREAM, ((MAP_AND_SEND, MAP_AND_SEND.replace("partial =", "_ =")),)
    ),
    "stream instead of the part": Mutant(
        STITCH, (("x = tl.where(biased, x, pending)\n", "pass\n"),)
    ),
    "stitch after the last sum": Mutant(
        STREAM,
        (
            (
                "self._x = stitch_linear(self.drain(), *stitch)\n",
                "self._x = stitch_linear(self._x, *stitch)\n",
            ),
        ),
    ),
    "sum lost on the way up": Mutant(
        STREAM, (("return stitch_linear(total, s", "return 0 * stitch_linear(total, s"),)
    ),
    "slots of the current width": Mutant(
        SPLIT_PHASE, (("        exchange.slot_elements,\n", "        exchange.rows * n,\n"),)
    ),
    "sum lost on the way down": Mutant(STREAM, ((SEND, SEND.partition("\n")[0] + "\n"),)),
}


def errors_of_mutants(context: RankContext, mutants: list[Mutant]) -> list[float]:
    """Return the error of each mutant; all ranks run the same one at the same time."""
    errors = []
    for number, mutant in enumerate(mutants):
        copy = context.folder / f"copy-{context.rank}-{number}"
        shared = context.folder / f"shared-{number}"
        shared.mkdir(exist_ok=True)
        with imported_mutant(mutant, copy):
            errors.append(largest_error(replace(context, folder=shared), UP_DOWN))
    return errors


def test_wrong_crossing_of_a_stitch_is_detected() -> None:
    same = Mutant(STREAM, ())
    by_rank = run_ranks(errors_of_mutants, 2, [same, *WRONG_CROSSINGS.values()])
    clean, *worst = (max(errors) for errors in zip(*by_rank, strict=True))
    assert clean < 1e-6
    assert [name for name, got in zip(WRONG_CROSSINGS, worst, strict=True) if got < 1e-3] == []


LATE_PUSH = (Delay("store", ranks=(1,), chance=0.5, kernel="_push"),)
RACES = {
    "read before arrival": (
        Mutant("comm/signals", (("while ahead < 0:", "while ahead < -(2**30):"),)),
        LATE_PUSH,
    ),
    "signals of the current width": (
        Mutant(
            SPLIT_PHASE,
            (
                (
                    "        exchange.programs,\n",
                    "        triton.cdiv(n, exchange.columns),\n",
                ),
            ),
        ),
        LATE_PUSH,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RACES)
def test_reduction_that_changes_width_with_planted_bug_is_detected(name: str) -> None:
    mutant, delays = RACES[name]
    assert detect(largest_error, UP_DOWN, delays=delays, mutant=mutant)
