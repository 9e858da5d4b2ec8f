"""Routes of the server through several anchors, over the symmetric link and with its kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.comm.symmetric import ABORT_FLAG, SymmetricCommunicator
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.model import stitched
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch_kernels import SharedMapping
from tests.support.elastic_models import FAMILY, LADDER, Definition, random_family, write_elastic
from tests.support.stitched_kernels import ROUTES, KernelRank, KernelStream, random_tokens
from tests.system.kernels.ranks import Delay, RankContext, run_ranks

RESIDUAL = "ladderstitch.text.model.residual"
UP, DOWN = "small-2+large", "large-2+small"
PROMPT, TOKENS = 2, 4
Edit = tuple[str, str]


def open_link(context: RankContext) -> SymmetricCommunicator:
    """Return the communicator of `link: symmetric` for partials of few rows."""
    if context.rank == 0:
        (context.folder / ABORT_FLAG).write_bytes(bytes(4096))
    context.barrier.wait()
    memory = SharedMapping(context.folder, context.rank, context.ranks)
    device = torch.device("cpu")
    return SymmetricCommunicator(
        memory, context.folder, PROMPT, FAMILY.width, torch.float32, device
    )


def decode(
    context: RankContext, residual: ResidualScheme, runs: list[tuple[str, Edit | None]]
) -> list[np.ndarray]:
    """Return this rank's logits for runs of a route, each with an edit of the stream's source."""
    results = []
    for number, (name, edit) in enumerate(runs):
        folder = context.folder / str(number)
        folder.mkdir(exist_ok=True)
        comm = open_link(replace(context, folder=folder))
        stream = KernelStream if edit is None else edited_stream(edit)
        stitched.ResidualStream = stream  # type: ignore[misc]
        held = KernelRank(comm, residual, all_kernels=edit is None)
        logits = held.decode(random_tokens(TOKENS), PROMPT, ROUTES[name])
        results.append(logits.numpy())
        context.barrier.wait()  # a rank that closes the link ends the waits of all
        comm.close()
    return results


def edited_stream(edit: Edit) -> type:
    """Return `KernelStream` over a copy of `ResidualStream` with a planted bug."""
    spec = importlib.util.find_spec(RESIDUAL)
    assert spec is not None
    assert spec.origin is not None
    source, (old, new) = Path(spec.origin).read_text(), edit
    assert source.count(old) == 1, f"expected {old!r} once in the source"
    module = ModuleType(RESIDUAL)
    exec(compile(source.replace(old, new), spec.origin, "exec"), module.__dict__)

    class EditedStream(module.ResidualStream):  # type: ignore[name-defined,misc]
        def __init__(self, x: Tensor, comm: SymmetricCommunicator) -> None:
            super().__init__(x, comm)
            self.uses_kernels = True

    return EditedStream


def definition(name: str, residual: ResidualScheme) -> Tensor:
    lag = int(residual.scheme == "ladder")
    routes = [ROUTES[name]] * TOKENS
    return Definition(random_family(), lag=lag).logits(random_tokens(TOKENS), routes)


def errors(by_rank: list[list[np.ndarray]], expected: list[Tensor]) -> list[float]:
    """Return the error of each run, relative to the largest logit; infinite if one is NaN."""
    found = []
    for parts, whole in zip(zip(*by_rank, strict=True), expected, strict=True):
        difference = np.abs(np.concatenate(parts, axis=-1) - whole.numpy()).max()
        found.append(float(np.nan_to_num(difference, nan=np.inf) / whole.abs().max()))
    return found


EVERYWHERE = tuple(
    Delay(access, ranks=(0, 1, 2, 3), chance=0.02, seconds=0.004)
    for access in ("load", "store", "atomic")
)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_routes_over_symmetric_link_equals_definition(ranks: int) -> None:
    names = list(ROUTES) if ranks == 2 else [UP, DOWN]
    by_rank = run_ranks(decode, ranks, LADDER, [(n, None) for n in names], delays=EVERYWHERE)
    expected = [definition(name, LADDER) for name in names]
    assert max(errors(by_rank, expected)) < 1e-4


SENT = "            last = self._comm.all_reduce_async(partial)\n        else"
INDENT = 12 * " "
MAPPED = "x, partial = stitch_pending(self._drain(), partial, *map_)\n"
BUGS: dict[str, tuple[str, Edit]] = {
    "bias from every rank": (DOWN, (SENT, SENT.replace("(partial)", "(partial + map_.bias)"))),
    "bias on arrival": (
        UP,
        ("work.work), work.matrix)", "work.work), work.matrix, 1 + 0 * work.matrix[:, 0])"),
    ),
    "part in the stream and in the sum": (
        DOWN,
        ("stitch_pending(self._drain(), p", "stitch_pending(self._drain() + partial, p"),
    ),
    "sent without the map": (
        DOWN,
        (
            MAPPED,
            f"kept = partial[:, : len(map_.bias)].contiguous()\n{INDENT}{MAPPED}"
            f"{INDENT}partial = kept\n",
        ),
    ),
    "not mapped on arrival": (
        UP,
        (
            "return F.linear(self._comm.wait(work.work), work.matrix)",
            "return F.pad(self._comm.wait(work.work), (0, 16))",
        ),
    ),
    "sum lost on the way up": (
        UP,
        (
            "return F.linear(self._comm.wait(work.work), work.matrix)",
            "return 0 * F.linear(self._comm.wait(work.work), work.matrix)",
        ),
    ),
    "sum lost on the way down": (
        DOWN,
        (SENT, SENT.replace("(partial)", "(0 * partial)")),
    ),
    "stream of before the map": (
        UP,
        (
            "MappedWork(self._in_flight.pop(), map_.matrix)\n            self._reduced, self._full"
            " = F.linear(self._drain(), *map_), None",
            "MappedWork(self._in_flight.pop(), map_.matrix)\n            self._reduced, self._full"
            " = F.linear(self._reduced, *map_), None\n            self._in_flight.clear()",
        ),
    ),
}


def test_planted_bug_in_crossing_of_the_stream_is_detected() -> None:
    runs = [(UP, None), (DOWN, None), *BUGS.values()]
    by_rank = run_ranks(decode, 2, LADDER, runs)
    up, down, *found = errors(by_rank, [definition(name, LADDER) for name, _ in runs])
    assert max(up, down) < 1e-4
    assert [bug for bug, worst in zip(BUGS, found, strict=True) if worst < 1e-2] == []


async def test_group_with_symmetric_link_crosses_stitches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bundle = TextBundle.load(write_elastic(tmp_path / "elastic"))
    config = RankConfig.of(bundle, ranks=2, max_model_len=16, max_batched_tokens=16)
    group = RankGroup(config, GroupOptions(link="symmetric"))
    tokens = np.array([random_tokens(TOKENS)])
    try:
        await group.start()
        for name in (UP, DOWN):
            got = await group.forward(tokens, 0, list(ROUTES).index(name), last_only=False)
            whole = definition(name, LADDER).numpy()
            assert np.abs(got[0] - whole).max() <= 1e-4 * np.abs(whole).max()
    finally:
        await group.close()
