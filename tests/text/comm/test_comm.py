"""Links add up what ranks post, in any interleaving; broken groups say so instead of hanging."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch

from ladderstitch.text.comm import shared_memory
from ladderstitch.text.comm.base import Communicator, PeerLost
from ladderstitch.text.comm.shared_memory import LinkModel, SharedMemoryCommunicator, SharedRegion
from ladderstitch.text.comm.tcp import TcpCommunicator

MakeLinks = Callable[[int], list[Communicator]]
SECRET = b"s" * 32


def shared_links(ranks: int, model: LinkModel | None = None) -> list[Communicator]:
    region = SharedRegion(ranks, 4096)
    links: list[Communicator] = [
        SharedMemoryCommunicator(region.path, rank, ranks, region.slot_bytes, model)
        for rank in range(ranks)
    ]
    region.forget()
    return links


def tcp_links(ranks: int) -> list[Communicator]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks)]
    addresses = [listener.getsockname() for listener in listeners]
    links = together(
        [
            lambda rank=rank: TcpCommunicator(listeners[rank], rank, addresses, SECRET)  # type: ignore[misc]
            for rank in range(ranks)
        ]
    )
    close(listeners)
    return links


def together(works: list[Callable[[], object]]) -> list:
    """Run each in a thread; their results in order."""
    results: list[object] = [None] * len(works)

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except PeerLost as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return results


def close(holders: list) -> None:
    for holder in holders:
        holder.close()


def ladder(link: Communicator, steps: int, seed: int) -> list[float]:
    """Two reductions in flight, as a ladder keeps them, with pauses where races would show."""
    pauses, flying, sums = random.Random(seed), [], []
    for step in range(steps):
        flying.append(link.post(torch.full((33,), float((link.rank + 1) * (step + 1)))))
        if pauses.random() < 0.2:
            time.sleep(0.002)
        if len(flying) == 2:
            total = link.wait(flying.pop(0))
            assert total.unique().numel() == 1
            sums.append(float(total[0]))
    return [*sums, float(link.wait(flying.pop(0))[0])]


@pytest.mark.parametrize("make", [shared_links, tcp_links], ids=["shared memory", "tcp"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_two_in_flight_are_told_apart(make: MakeLinks, ranks: int) -> None:
    links = make(ranks)
    works = [lambda link=link: ladder(link, 60, link.rank) for link in links]
    expected = [float(sum(range(1, ranks + 1)) * (step + 1)) for step in range(60)]
    for sums in together(works):
        assert sums == expected
    close(links)


def test_with_two_slots_a_slow_reader_would_see_later_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted bug that four slots are there against: the fast rank overwrites unread slots."""
    monkeypatch.setattr(shared_memory, "SLOTS", 2)
    fast, slow = shared_links(2)
    tickets = [slow.post(torch.full((4,), 10.0)) for _ in range(2)]
    first, _ = (fast.post(torch.full((4,), 1.0)) for _ in range(2))
    assert float(fast.wait(first)[0]) == 11
    fast.post(torch.full((4,), 99.0))  # its third, while the slow one has read nothing yet
    with pytest.raises(PeerLost, match="slot of reduction 1 was used again before it was read"):
        slow.wait(tickets[0])


@pytest.mark.parametrize("make", [shared_links, tcp_links], ids=["shared memory", "tcp"])
def test_messages_beyond_the_socket_buffers_do_not_block_each_other(make: MakeLinks) -> None:
    if make is shared_links:
        region = SharedRegion(2, 8 << 20)
        links: list[Communicator] = [
            SharedMemoryCommunicator(region.path, rank, 2, region.slot_bytes) for rank in range(2)
        ]
        region.forget()
    else:
        links = make(2)
    big = torch.ones(2 << 20)
    for total in together([lambda link=link: link.wait(link.post(big)) for link in links]):
        assert float(total.min()) == float(total.max()) == 2
    close(links)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_in_float32(dtype: torch.dtype) -> None:
    values = [torch.tensor([v], dtype=dtype) for v in (1.0, 2**-8, 2**-8, 2**-8)]
    for make in (shared_links, tcp_links):
        links = make(4)
        totals = together(
            [lambda link=link: link.wait(link.post(values[link.rank])) for link in links]
        )
        expected = torch.stack(values).double().sum().to(dtype)
        assert all(total.dtype == dtype and total.item() == expected for total in totals)
        close(links)


def test_an_emulated_link_is_not_faster_than_its_latency() -> None:
    links = shared_links(2, LinkModel(latency_s=0.03))
    started = time.monotonic()
    together([lambda link=link: link.wait(link.post(torch.ones(8))) for link in links])
    assert time.monotonic() - started >= 0.03
    assert LinkModel(0.001, 1e9).flight_ns(1_000_000) == 2_000_000


def test_an_aborted_region_ends_every_wait() -> None:
    region = SharedRegion(2, 64)
    link = SharedMemoryCommunicator(region.path, 0, 2, region.slot_bytes)
    region.forget()
    ticket = link.post(torch.ones(4))
    threading.Timer(0.05, region.abort).start()
    assert isinstance(together([lambda: link.wait(ticket)])[0], PeerLost)


def test_a_closed_tcp_peer_ends_every_wait() -> None:
    near, far = tcp_links(2)
    ticket = near.post(torch.ones(4))
    far.close()
    assert isinstance(together([lambda: near.wait(ticket)])[0], PeerLost)
    near.close()


def test_strangers_do_not_become_ranks() -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [listener.getsockname() for listener in listeners]
    with socket.create_connection(addresses[0]) as stranger:
        stranger.sendall(b"\1" + b"\0" * 7 + b"x" * 32)
        works: list[Callable[[], object]] = [
            lambda: TcpCommunicator(listeners[0], 0, addresses, SECRET),
            lambda: TcpCommunicator(listeners[1], 1, addresses, SECRET),
        ]
        links = together(works)
    totals = together([lambda link=link: link.wait(link.post(torch.ones(1))) for link in links])
    assert [float(total) for total in totals] == [2.0, 2.0]
    close([*links, *listeners])


def test_a_partial_beyond_the_slots_is_refused() -> None:
    (link, _) = shared_links(2)
    with pytest.raises(ValueError, match="partial: expected at most 4096 bytes, got 8192"):
        link.post(torch.ones(2048))
