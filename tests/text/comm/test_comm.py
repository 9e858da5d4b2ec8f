"""Tests of communicators: sums in any interleaving, and errors instead of hanging."""

from __future__ import annotations

import errno
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ladderstitch.errors import ConfigError
from ladderstitch.text.comm import shared_memory
from ladderstitch.text.comm.base import Communicator, PeerLost
from ladderstitch.text.comm.shared_memory import (
    EmulatedLink,
    SharedMemoryCommunicator,
    SharedRegion,
)
from ladderstitch.text.comm.tcp import TcpCommunicator

CreateComms = Callable[[int], list[Communicator]]
SECRET = b"s" * 32


def shared_memory_comms(ranks: int, link: EmulatedLink | None = None) -> list[Communicator]:
    region = SharedRegion(ranks, 4096)
    comms: list[Communicator] = [
        SharedMemoryCommunicator(region.path, rank, ranks, region.slot_bytes, link)
        for rank in range(ranks)
    ]
    region.unlink()
    return comms


def tcp_comms(ranks: int) -> list[Communicator]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks)]
    addresses = [listener.getsockname() for listener in listeners]
    comms = run_in_threads(
        [
            lambda rank=rank: TcpCommunicator(listeners[rank], rank, addresses, SECRET)  # type: ignore[misc]
            for rank in range(ranks)
        ]
    )
    close_all(listeners)
    return comms


def run_in_threads(works: list[Callable[[], object]]) -> list:
    """Run each function in a thread and return the results, or `PeerLost` errors, in order."""
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
        thread.join(300)
        assert not thread.is_alive(), "a rank hangs"
    return results


def close_all(resources: list) -> None:
    for resource in resources:
        resource.close()


def ladder(comm: Communicator, steps: int, seed: int) -> list[float]:
    """Keep two reductions in flight, as a ladder does, with pauses that expose races."""
    pauses, in_flight, sums = random.Random(seed), [], []
    for step in range(steps):
        value = float((comm.rank + 1) * (step + 1))
        in_flight.append(comm.all_reduce_async(torch.full((33,), value)))
        if pauses.random() < 0.2:
            time.sleep(0.002)
        if len(in_flight) == 2:
            total = comm.wait(in_flight.pop(0))
            assert total.unique().numel() == 1
            sums.append(float(total[0]))
    return [*sums, float(comm.wait(in_flight.pop(0))[0])]


@pytest.mark.parametrize("create", [shared_memory_comms, tcp_comms], ids=["shared memory", "tcp"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_two_reductions_in_flight_keep_their_own_sums(create: CreateComms, ranks: int) -> None:
    comms = create(ranks)
    works = [lambda comm=comm: ladder(comm, 60, comm.rank) for comm in comms]
    expected = [float(sum(range(1, ranks + 1)) * (step + 1)) for step in range(60)]
    for sums in run_in_threads(works):
        assert sums == expected
    close_all(comms)


def test_two_slots_instead_of_four_are_detected_as_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the planted bug that four slots prevent, the fast rank overwrites unread slots."""
    monkeypatch.setattr(shared_memory, "SLOTS", 2)
    fast, slow = shared_memory_comms(2)
    works = [slow.all_reduce_async(torch.full((4,), 10.0)) for _ in range(2)]
    first, _ = (fast.all_reduce_async(torch.full((4,), 1.0)) for _ in range(2))
    assert float(fast.wait(first)[0]) == 11
    fast.all_reduce_async(torch.full((4,), 99.0))  # its third; the slow rank has read nothing
    with pytest.raises(PeerLost, match="slot of reduction 1 was used again before it was read"):
        slow.wait(works[0])


@pytest.mark.parametrize("create", [shared_memory_comms, tcp_comms], ids=["shared memory", "tcp"])
def test_partials_beyond_the_socket_buffers_do_not_block(create: CreateComms) -> None:
    if create is shared_memory_comms:
        region = SharedRegion(2, 8 << 20)
        comms: list[Communicator] = [
            SharedMemoryCommunicator(region.path, rank, 2, region.slot_bytes) for rank in range(2)
        ]
        region.unlink()
    else:
        comms = create(2)
    big = torch.ones(2 << 20)
    works = [lambda comm=comm: comm.wait(comm.all_reduce_async(big)) for comm in comms]
    for total in run_in_threads(works):
        assert float(total.min()) == float(total.max()) == 2
    close_all(comms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_memory_left_by_others_changes_no_sum(dtype: torch.dtype) -> None:
    """Slots hold the partials of earlier passes, of other shapes, which may be NaN."""
    comms = shared_memory_comms(2)
    for comm in comms:
        assert isinstance(comm, SharedMemoryCommunicator)
        for slot in (slot for slots in comm._slots for slot in slots):
            slot.fill_(0xFF)  # NaN in every format
    for size in (5, 900, 1, 33, 2, 7):
        works = [
            lambda comm=comm, size=size: comm.wait(  # type: ignore[misc]
                comm.all_reduce_async(torch.full((size,), comm.rank + 1.0, dtype=dtype))
            )
            for comm in comms
        ]
        for total in run_in_threads(works):
            assert torch.equal(total, torch.full((size,), 3.0, dtype=dtype))
    close_all(comms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_partials_are_summed_in_float32(dtype: torch.dtype) -> None:
    values = [torch.tensor([v], dtype=dtype) for v in (1.0, 2**-8, 2**-8, 2**-8)]
    for create in (shared_memory_comms, tcp_comms):
        comms = create(4)
        totals = run_in_threads(
            [
                lambda comm=comm: comm.wait(comm.all_reduce_async(values[comm.rank]))
                for comm in comms
            ]
        )
        expected = torch.stack(values).double().sum().to(dtype)
        assert all(total.dtype == dtype and total.item() == expected for total in totals)
        close_all(comms)


def test_emulated_link_takes_at_least_its_latency() -> None:
    comms = shared_memory_comms(2, EmulatedLink(latency_s=0.03))
    started = time.monotonic()
    run_in_threads(
        [lambda comm=comm: comm.wait(comm.all_reduce_async(torch.ones(8))) for comm in comms]
    )
    assert time.monotonic() - started >= 0.03
    assert EmulatedLink(0.001, 1e9).delay_ns(1_000_000) == 2_000_000


def test_abort_of_the_region_ends_a_wait() -> None:
    region = SharedRegion(2, 64)
    comm = SharedMemoryCommunicator(region.path, 0, 2, region.slot_bytes)
    region.unlink()
    work = comm.all_reduce_async(torch.ones(4))
    threading.Timer(0.05, region.abort).start()
    assert isinstance(run_in_threads([lambda: comm.wait(work)])[0], PeerLost)


def test_close_of_a_tcp_peer_ends_a_wait() -> None:
    near, far = tcp_comms(2)
    work = near.all_reduce_async(torch.ones(4))
    far.close()
    assert isinstance(run_in_threads([lambda: near.wait(work)])[0], PeerLost)
    near.close()


def test_tcp_connection_without_the_secret_is_rejected() -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [listener.getsockname() for listener in listeners]
    with socket.create_connection(addresses[0]) as stranger:
        stranger.sendall(b"\1" + b"\0" * 7 + b"x" * 32)
        works: list[Callable[[], object]] = [
            lambda: TcpCommunicator(listeners[0], 0, addresses, SECRET),
            lambda: TcpCommunicator(listeners[1], 1, addresses, SECRET),
        ]
        comms = run_in_threads(works)
    totals = run_in_threads(
        [lambda comm=comm: comm.wait(comm.all_reduce_async(torch.ones(1))) for comm in comms]
    )
    assert [float(total) for total in totals] == [2.0, 2.0]
    close_all([*comms, *listeners])


def test_partial_larger_than_a_slot_raises() -> None:
    (comm, _) = shared_memory_comms(2)
    with pytest.raises(ValueError, match="partial: expected at most 4096 bytes, got 8192"):
        comm.all_reduce_async(torch.ones(2048))


@pytest.fixture
def full_folders(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Return a set of folders in which no file has room; it is empty at first."""
    full: set[Path] = set()
    reserve = os.posix_fallocate

    def fail(descriptor: int, offset: int, size: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fail)
    return full


def files_of(folder: Path) -> set[Path]:
    return set(folder.glob("ladderstitch-*"))


@pytest.mark.parametrize("case", ["full", "missing"])
def test_region_without_shared_memory_is_a_file(
    full_folders: set[Path],
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory = tmp_path / "shm"  # of this test alone: other tests write to the real one meanwhile
    monkeypatch.setattr(shared_memory, "FOLDER", memory)
    if case == "full":
        memory.mkdir()
        full_folders.add(memory)
    region = SharedRegion(2, 1 << 20)
    assert region.path.parent == tmp_path
    assert files_of(memory) == set()
    assert f"{shared_memory.FOLDER}: expected 8.0 MiB" in caplog.text
    comms = [SharedMemoryCommunicator(region.path, n, 2, region.slot_bytes) for n in range(2)]
    region.unlink()
    works = [lambda comm=comm: comm.wait(comm.all_reduce_async(torch.ones(9))) for comm in comms]
    assert [float(total.sum()) for total in run_in_threads(works)] == [18.0, 18.0]
    assert files_of(tmp_path) == set()


def test_region_without_any_room_names_what_is_short(
    full_folders: set[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full_folders.update((shared_memory.FOLDER, tmp_path))
    with pytest.raises(ConfigError) as caught:
        SharedRegion(4, 1 << 20)
    text = str(caught.value)
    assert text.startswith("shared memory of 4 ranks: /dev/shm: expected 16.0 MiB, got ")
    assert "--shm-size" in text
    assert str(tmp_path) in text
    assert files_of(tmp_path) == set()


def test_region_reserves_its_memory() -> None:
    """A page without room would end the process that writes to it."""
    region = SharedRegion(2, 1 << 20)
    status = region.path.stat()
    region.unlink()
    assert status.st_blocks * 512 >= status.st_size > 8 << 20
