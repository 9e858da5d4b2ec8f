"""Tests of which reductions a read of the stream waits for, and of schemes that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.residual_stream import ResidualStream


class RecordingCommunicator:
    """A communicator that doubles partials and records the order of waits."""

    rank, ranks = 0, 2

    def __init__(self) -> None:
        self.started: list[Tensor] = []
        self.waited: list[int] = []

    def all_reduce_async(self, partial: Tensor) -> int:
        self.started.append(partial)
        return len(self.started) - 1

    def wait(self, work: int) -> Tensor:
        self.waited.append(work)
        return 2 * self.started[work]

    def close(self) -> None:
        raise AssertionError("a stream does not close its communicator")


def test_ladder_read_waits_for_all_but_the_last_sub_block() -> None:
    comm = RecordingCommunicator()
    stream = ResidualStream(torch.zeros(1), comm)
    reads = []
    for value in (1.0, 10.0, 100.0, 1000.0):
        reads.append(stream.read(lag=1).item())
        stream.add(torch.tensor([value]))
    assert reads == [0, 0, 2, 22]
    assert comm.waited == [0, 1]
    assert stream.read().item() == 2222
    assert comm.waited == [0, 1, 2, 3]


def test_mixed_lags_wait_once_for_each_reduction() -> None:
    comm = RecordingCommunicator()
    stream = ResidualStream(torch.zeros(1), comm)
    stream.add(torch.tensor([1.0]))
    assert stream.read(lag=0).item() == 2
    stream.add(torch.tensor([10.0]))
    assert stream.read(lag=1).item() == 2
    assert stream.read(lag=0).item() == 22
    stream.add(torch.tensor([100.0]))
    assert stream.read(lag=0).item() == 222
    assert comm.waited == [0, 1, 2]


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (
            ResidualScheme(scheme="ladder", ladder_layers=5),
            r"ladder_layers: expected layers 0 to 3, got",
        ),
        (
            ResidualScheme(scheme="ladder", ladder_layers=(1, 4)),
            r"expected layers 0 to 3, got \[4\]",
        ),
        (
            ResidualScheme(scheme="desync"),
            "reduce_after: expected a pair for each of 4 layers, got none",
        ),
        (
            ResidualScheme(scheme="desync", reduce_after=((True, False),) * 4, ranks=2),
            "reduce_after: expected the last MLP to reduce",
        ),
        (
            ResidualScheme(scheme="desync", reduce_after=((True, True),) * 4, ranks=4),
            r"ranks: expected 4 \(a desync model is defined for one rank count\), got 2",
        ),
    ],
)
def test_plan_layers_of_an_unfit_scheme_raises(residual: ResidualScheme, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_layers(residual, 4, 2)


def test_ladder_layers_are_all_the_last_n_or_a_list() -> None:
    def lags(which: int | tuple[int, ...] | None) -> list[int]:
        residual = ResidualScheme(scheme="ladder", ladder_layers=which)
        return [plan.lag for plan in plan_layers(residual, 4, 1)]

    assert [lags(None), lags(2), lags((0, 3)), lags(0)] == [
        [1, 1, 1, 1],
        [0, 0, 1, 1],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
    ]
