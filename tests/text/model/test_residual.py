"""Which sub-blocks a read of the stream waits for; schemes that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.residual import ResidualScheme, ResidualStream, plan_layers


class CountingLink:
    """Doubles what is posted and remembers what was waited for."""

    rank, ranks = 0, 2

    def __init__(self) -> None:
        self.posted: list[Tensor] = []
        self.waited: list[int] = []

    def post(self, partial: Tensor) -> int:
        self.posted.append(partial)
        return len(self.posted) - 1

    def wait(self, ticket: int) -> Tensor:
        self.waited.append(ticket)
        return 2 * self.posted[ticket]

    def close(self) -> None:
        raise AssertionError("nobody closes the link of a stream")


def test_a_ladder_read_waits_for_all_but_the_last_sub_block() -> None:
    link = CountingLink()
    stream = ResidualStream(torch.zeros(1), link)
    reads = []
    for value in (1.0, 10.0, 100.0, 1000.0):
        reads.append(stream.read(lag=1).item())
        stream.add(torch.tensor([value]))
    assert reads == [0, 0, 2, 22]
    assert link.waited == [0, 1]
    assert stream.read().item() == 2222
    assert link.waited == [0, 1, 2, 3]


def test_a_hybrid_stream_waits_once_for_each_reduction() -> None:
    link = CountingLink()
    stream = ResidualStream(torch.zeros(1), link)
    stream.add(torch.tensor([1.0]))
    assert stream.read(lag=0).item() == 2
    stream.add(torch.tensor([10.0]))
    assert stream.read(lag=1).item() == 2
    assert stream.read(lag=0).item() == 22
    stream.add(torch.tensor([100.0]))
    assert stream.read(lag=0).item() == 222
    assert link.waited == [0, 1, 2]


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
            "ranks: a desync model is defined for one rank count, here 4; got 2",
        ),
    ],
)
def test_schemes_that_do_not_fit_are_refused(residual: ResidualScheme, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_layers(residual, 4, 2)


def test_the_last_layers_or_a_list_read_late() -> None:
    def lags(which: int | tuple[int, ...] | None) -> list[int]:
        residual = ResidualScheme(scheme="ladder", ladder_layers=which)
        return [plan.lag for plan in plan_layers(residual, 4, 1)]

    assert [lags(None), lags(2), lags((0, 3)), lags(0)] == [
        [1, 1, 1, 1],
        [0, 0, 1, 1],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
    ]
