"""A rank from the group's side: its connection, its errors, and how its process is started."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from ladderstitch.errors import InternalError, LadderstitchError
from ladderstitch.text.engine.rank import SECRET_VARIABLE
from ladderstitch.text.messages import Kind, Message, read_message, write_message

log = logging.getLogger(__name__)

GLIBC_VARIABLE = "GLIBC_TUNABLES"
"""Environment variable with options of the C library, separated by colons."""


class RankLost(LadderstitchError):
    """An error because a rank's connection ended; the group has to repeat what it was doing."""


class RankFailed(LadderstitchError):
    """An error that a rank reports about the request that it could not fulfil.

    `peer_lost` is true if the reason is that the rank lost another rank of its group.
    """

    def __init__(self, message: str, *, peer_lost: bool = False) -> None:
        super().__init__(message)
        self.peer_lost = peer_lost


class RankHandle:
    """A connected rank, which serves one request at a time.

    `on_loss` is called once if the connection ends before `close`. A request must not be
    cancelled, because its reply would be taken for the reply of the next request.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        registration: dict[str, Any],
        process: RankProcess | None,
        on_loss: Callable[[RankHandle], None],
    ) -> None:
        self.pid: int = registration["pid"]
        self.comm_address: tuple[str, int] = tuple(registration["comm_address"])
        self.lost = self.has_model = False
        self._process = process
        self._writer = writer
        self._on_loss = on_loss
        self._reply: asyncio.Future[Message] | None = None
        self._reading = asyncio.create_task(self._read_replies(reader), name=f"rank-{self.pid}")

    @property
    def busy(self) -> bool:
        """Whether a request has not been answered yet."""
        return self._reply is not None

    def request(self, message: Message) -> Awaitable[Message]:
        """Send a message at once, and return an awaitable of the reply, which must be awaited.

        It raises `RankLost` if the connection ends, and `RankFailed` with the reason that the rank
        reports.
        """
        reply = self._reply = asyncio.get_running_loop().create_future()
        if self.lost:
            reply.set_exception(self._loss())
        else:
            write_message(self._writer, message)
        return self._receive(reply)

    async def _receive(self, pending: asyncio.Future[Message]) -> Message:
        try:
            reply = await pending
        finally:
            self._reply = None
        if reply.kind == Kind.FAILED:
            raise RankFailed(reply.header["error"], peer_lost=reply.header.get("peer_lost", False))
        return reply

    async def close(self) -> None:
        """Disconnect, so that the rank exits; kill its process if the group started it."""
        self._reading.cancel()
        self._disconnect()
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    async def _read_replies(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await read_message(reader)
                if self._reply is not None and not self._reply.done():
                    self._reply.set_result(message)
        except asyncio.CancelledError:
            self._disconnect()
            raise
        except (EOFError, OSError):
            self._report_loss()  # the process has ended
        except Exception:
            log.exception("rank pid=%d sent what is no message; it counts as lost", self.pid)
            self._report_loss()

    def _report_loss(self) -> None:
        if not self.lost:
            self._disconnect()
            self._on_loss(self)

    def _disconnect(self) -> None:
        self.lost = True
        self._writer.close()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(self._loss())

    def _loss(self) -> RankLost:
        return RankLost(f"rank process {self.pid} died")


def request_all(
    ranks: Sequence[RankHandle], message: Message
) -> Awaitable[list[Message | BaseException]]:
    """Send a message to all ranks at once, and return every rank's reply or error, in order.

    What is returned must be awaited.
    """
    return asyncio.gather(*[rank.request(message) for rank in ranks], return_exceptions=True)


def raise_first_error(replies: Sequence[Message | BaseException]) -> list[Message]:
    """Return the replies, or raise the first error among them."""
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    return [reply for reply in replies if isinstance(reply, Message)]


def raise_pass_error(replies: Sequence[Message | BaseException]) -> list[Message]:
    """Return every rank's reply to a forward pass, or raise the cause of its failure.

    Raises `RankLost` if a rank died, even if others report failures, since these follow from the
    loss. Raises `InternalError` if the pass failed on a rank, even if others report that they lost
    a peer, since a rank whose pass failed leaves the communicator.
    """
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, RankFailed):
            raise reply
    failures = [reply for reply in replies if isinstance(reply, RankFailed)]
    for failure in failures:
        if not failure.peer_lost:
            raise InternalError(f"the forward pass failed: {failure}")
    if failures:
        raise RankLost(str(failures[0]))
    return raise_first_error(replies)


class RankProcess(Protocol):
    """A process (or Ray actor) that was started for a rank."""

    async def wait(self) -> object:
        """Wait until the process has ended."""

    def kill(self) -> None:
        """Kill the process; do nothing if it has ended."""


class Launcher(Protocol):
    """A function that starts one rank, which then connects to the group's address."""

    async def __call__(self, address: str, secret: str) -> RankProcess:
        """Start the rank and return its process, without waiting until it has registered."""
        ...


class _SubprocessRank:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def wait(self) -> object:
        return await self.process.wait()

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


def huge_pages() -> dict[str, str]:
    """Return the environment in which a process allocates its memory in huge pages.

    A step of a language model reads all weights. The processor prefetches them across 2 MB instead
    of 4 KB, so that a step takes 10 % less time (SmolLM2 in int4). Linux must permit it
    (`/sys/kernel/mm/transparent_hugepage/enabled`: madvise or always), and glibc must be 2.35 or
    later; others ignore it.
    """
    before = os.environ.get(GLIBC_VARIABLE, "")
    if "glibc.malloc.hugetlb" in before:
        return {}
    return {GLIBC_VARIABLE: ":".join(filter(None, (before, "glibc.malloc.hugetlb=1")))}


async def launch_process(address: str, secret: str, *, through: Sequence[str] = ()) -> RankProcess:
    """Start a rank as a process of this machine.

    The rank reads the secret from its standard input: other processes of the machine can read its
    command line and, if they have the same user, its environment. `through` is a command that runs
    the process elsewhere, e.g. in another network namespace.
    """
    command = (*through, sys.executable, "-m", "ladderstitch.text.engine.rank", address)
    environment = os.environ | huge_pages()
    environment.pop(SECRET_VARIABLE, None)
    return await start_rank_process(command, secret, environment)


async def start_rank_process(
    command: Sequence[str], secret: str, environment: dict[str, str]
) -> RankProcess:
    """Start a command that runs a rank, and write the secret to its standard input."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, env=environment
    )
    assert process.stdin is not None, "a pipe"
    process.stdin.write(secret.encode())
    process.stdin.close()
    return _SubprocessRank(process)
