"""Reductions between ranks that are processes, and the detection of planted bugs."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.system.kernels.mutants import Mutant
from tests.system.kernels.ranks import Delay, RankContext, detect, run_ranks

SPLIT_PHASE = "comm/split_phase"
ALL_REDUCE = "comm/all_reduce"
SIGNALS = "comm/signals"

EVERYWHERE = tuple(
    Delay(access, ranks=(0, 1, 2, 3), chance=0.1, seconds=0.004)
    for access in ("load", "store", "atomic")
)


def inputs(calls: int, ranks: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(calls, ranks, *shape, generator=torch.Generator().manual_seed(seed))


def ladder_of_products(context: RankContext, reductions: int, wrap: bool = False) -> float:
    """Return the largest error of reductions of which two are in flight, as in a ladder.

    `wrap` sets the counters so that they wrap during the run.
    """
    from ladderstitch_kernels import Exchange, SharedMapping, gemv_post, wait_add_norm

    rows, width, k = 3, 37, 19
    exchange = Exchange(
        SharedMapping(context.folder, context.rank, context.ranks),
        rows,
        width,
        torch.float32,
        columns=16,
    )
    if wrap:
        start = 2**31 - 3
        exchange.counts[::2] = start
        exchange.arrivals.local.fill_(start * exchange.programs - 2**32)
        context.barrier.wait()
    x = inputs(reductions, context.ranks, rows, k)
    weight = inputs(reductions, context.ranks, width, k, seed=1)
    residual, gain = inputs(1, 1, rows, width)[0, 0], torch.rand(width) + 0.5
    worst = 0.0
    for number in range(reductions + 1):
        if number < reductions:
            used = 1 + number % rows  # the number of rows changes
            gemv_post(x[number, context.rank, :used], weight[number, context.rank], exchange)
        if number:
            done, used = number - 1, 1 + (number - 1) % rows
            got = wait_add_norm(residual[:used].contiguous(), gain, 1e-5, exchange)
            total = residual[:used].double() + torch.einsum(
                "rmk,rnk->mn", x[done, :, :used].double(), weight[done].double()
            )
            normed = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
            for tensor, expected in zip(got, (total, normed), strict=True):
                difference = (tensor - expected).abs().max() / expected.abs().max()
                worst = max(worst, difference.nan_to_num(nan=float("inf")).item())
    return worst


def all_reduces(
    context: RankContext,
    algorithm: Literal["one_shot", "two_shot"],
    sizes: tuple[int, ...],
    programs: int = 2,
) -> float:
    """Return the largest error of calls of these sizes, one after another."""
    from ladderstitch_kernels import AllReduce, SharedMapping

    memory = SharedMapping(context.folder, context.rank, context.ranks)
    reduce = AllReduce(memory, max(sizes), torch.float32, programs=programs, block=32)
    worst = 0.0
    for call, size in enumerate(sizes):
        parts = inputs(1, context.ranks, size, seed=call)[0]
        got = reduce(parts[context.rank].clone(), algorithm)
        expected = parts.double().sum(0)
        difference = (got - expected).abs().max() / expected.abs().max()
        worst = max(worst, difference.nan_to_num(nan=float("inf")).item())
    return worst


SIZES = (97, 1, 33, 97, 64, 97, 97)


@pytest.mark.parametrize("ranks", [2, 4])
def test_split_phase_with_delays_is_exact(ranks: int) -> None:
    assert max(run_ranks(ladder_of_products, ranks, 12, delays=EVERYWHERE)) < 1e-6


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_all_reduce_with_delays_is_exact(algorithm: str, ranks: int) -> None:
    assert max(run_ranks(all_reduces, ranks, algorithm, SIZES, delays=EVERYWHERE)) < 1e-6


def test_split_phase_with_wrapping_epochs_is_exact() -> None:
    assert max(run_ranks(ladder_of_products, 2, 8, True)) < 1e-6


LATE_PUSH = (Delay("store", ranks=(1,), chance=0.5, kernel="_push"),)
LATE_STORE = (Delay("store", ranks=(1,), chance=0.5),)
LATE_READ = (Delay("load", ranks=(1,), chance=0.5, seconds=0.02, kernel="wait_add_norm_kernel"),)
LATE_SUM = (Delay("load", ranks=(1,), chance=0.5, seconds=0.02),)

PUSH = "_push(partial, where, exists, slots, epoch, rank, slot_elements, RANKS, SLOTS)\n"
SIGNAL = "signal(arrivals, rank, RANKS, RANKS_PAD)\n"
NEVER_WAITS = ("while ahead < 0:", "while ahead < -(2**30):")
ADVANCED_SLOT = "return epoch & (SLOTS - 1)"
SPLIT_PHASE_BUGS = {
    "no barrier": (Mutant(SIGNALS, (NEVER_WAITS,)), LATE_PUSH),
    "own flags only": (
        Mutant(SPLIT_PHASE, (("source < RANKS, epoch", "source < 1, epoch"),)),
        LATE_PUSH,
    ),
    "epoch off by one": (
        Mutant(SPLIT_PHASE, (("RANKS, epoch * programs", "RANKS, (epoch - 1) * programs"),)),
        LATE_PUSH,
    ),
    "store after signal": (
        Mutant(
            SPLIT_PHASE,
            (
                (
                    f"    {PUSH}    {SIGNAL}    advance",
                    f"    {SIGNAL}    {PUSH}    advance",
                ),
            ),
        ),
        LATE_PUSH,
    ),
    "single buffer": (Mutant(SPLIT_PHASE, ((ADVANCED_SLOT, "return epoch * 0"),)), LATE_READ),
    "2 slots": (Mutant(SPLIT_PHASE, (("SLOTS = 4", "SLOTS = 2"),)), LATE_READ),
    "3 slots": (
        Mutant(
            SPLIT_PHASE,
            (
                ("SLOTS = 4", "SLOTS = 3"),
                ("tl.static_assert((SLOTS & (SLOTS - 1)) == 0)", ""),
                (ADVANCED_SLOT, "return epoch % SLOTS"),
            ),
        ),
        LATE_READ,
    ),
}


@pytest.mark.parametrize("name", SPLIT_PHASE_BUGS)
def test_split_phase_with_planted_bug_is_detected(name: str) -> None:
    mutant, delays = SPLIT_PHASE_BUGS[name]
    assert detect(ladder_of_products, 8, delays=delays, mutant=mutant)
    if mutant.module == SPLIT_PHASE and delays == LATE_READ:
        assert max(run_ranks(ladder_of_products, 2, 8, delays=delays)) < 1e-6


FIRST_SLOT = "slot = ((epoch & (SLOTS - 1)) * RANKS)"
ONE_SHOT_BUGS = {
    "no barrier": (Mutant(SIGNALS, (NEVER_WAITS,)), LATE_STORE),
    "own flag only": (
        Mutant(ALL_REDUCE, (("source < RANKS, epoch", "source == rank, epoch"),)),
        LATE_STORE,
    ),
    "epoch off by one": (
        Mutant(ALL_REDUCE, (("source < RANKS, epoch", "source < RANKS, epoch - 1"),)),
        LATE_STORE,
    ),
    "store after signal": (
        Mutant(
            ALL_REDUCE,
            (
                ("    signal(arrival_table, rank * programs + program, RANKS, RANKS_PAD)\n", ""),
                (
                    "    mine = slot + rank * slot_elements\n",
                    "    mine = slot + rank * slot_elements\n"
                    "    signal(arrival_table, rank * programs + program, RANKS, RANKS_PAD)\n",
                ),
            ),
        ),
        LATE_STORE,
    ),
    "single buffer": (Mutant(ALL_REDUCE, ((FIRST_SLOT, "slot = (epoch * 0)"),)), LATE_SUM),
}


@pytest.mark.parametrize("name", ONE_SHOT_BUGS)
def test_one_shot_with_planted_bug_is_detected(name: str) -> None:
    mutant, delays = ONE_SHOT_BUGS[name]
    # The interpreter runs programs one after another, so the first of two would guard the second.
    assert detect(all_reduces, "one_shot", SIZES, 1, delays=delays, mutant=mutant)


@pytest.mark.parametrize("name", ["no barrier", "own flag only", "epoch off by one"])
def test_two_shot_with_planted_bug_is_detected(name: str) -> None:
    mutant, delays = ONE_SHOT_BUGS[name]
    assert detect(all_reduces, "two_shot", SIZES, delays=delays, mutant=mutant)
