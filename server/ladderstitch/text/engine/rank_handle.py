"""A rank as its group sees it: one socket, one question at a time."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ladderstitch.errors import LadderstitchError
from ladderstitch.text.engine import wire
from ladderstitch.text.engine.rank import SECRET_VARIABLE
from ladderstitch.text.engine.wire import Kind, Message


class RankLost(LadderstitchError):
    """A rank's connection ended; what the group was doing has to be done again."""


class RankFailed(LadderstitchError):
    """A rank could not do what it was asked for, and says why.

    `peer_lost` says that it did not hear from another rank of its group.
    """

    def __init__(self, message: str, *, peer_lost: bool = False) -> None:
        super().__init__(message)
        self.peer_lost = peer_lost


class RankHandle:
    """A connected rank. `on_loss` is called once, when its connection ends by itself.

    A question must not be cancelled: the answer would be taken for the next one's.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        hello: dict[str, Any],
        launched: RankProcess | None,
        on_loss: Callable[[RankHandle], None],
    ) -> None:
        self.pid: int = hello["pid"]
        self.listens: tuple[str, int] = tuple(hello["listens"])
        self.lost = False
        self._launched = launched
        self._writer = writer
        self._on_loss = on_loss
        self._reply: asyncio.Future[Message] | None = None
        self._reading = asyncio.create_task(self._read(reader), name=f"rank-{self.pid}")

    @property
    def busy(self) -> bool:
        return self._reply is not None

    async def ask(self, message: Message) -> Message:
        """Raises `RankLost`, or `RankFailed` with the rank's reason."""
        if self.lost:
            raise RankLost(f"rank process {self.pid} is gone")
        self._reply = asyncio.get_running_loop().create_future()
        try:
            await wire.write(self._writer, message)
        except OSError:
            self._lose()
        try:
            reply = await self._reply
        finally:
            self._reply = None
        if reply.kind == Kind.FAILED:
            raise RankFailed(reply.header["error"], peer_lost=reply.header.get("peer_lost", False))
        return reply

    async def close(self) -> None:
        """Let go of the rank, which ends itself; at once, if it was started here."""
        self._reading.cancel()
        self._end()
        if self._launched is not None:
            self._launched.kill()
            await self._launched.wait()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await wire.read(reader)
                if self._reply is not None and not self._reply.done():
                    self._reply.set_result(message)
        except (EOFError, OSError):
            self._lose()

    def _lose(self) -> None:
        if not self.lost:
            self._end()
            self._on_loss(self)

    def _end(self) -> None:
        self.lost = True
        self._writer.close()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(RankLost(f"rank process {self.pid} is gone"))


class RankProcess(Protocol):
    """A rank that was started."""

    async def wait(self) -> object:
        """Until it has ended."""

    def kill(self) -> None:
        """End it at once; nothing happens if it has ended."""


class Launcher(Protocol):
    """Starts one rank, which will connect to the group's address and say hello."""

    async def __call__(self, address: str, secret: str) -> RankProcess: ...


class _Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def wait(self) -> object:
        return await self.process.wait()

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


async def launch_process(address: str, secret: str, *, through: Sequence[str] = ()) -> RankProcess:
    """A process of this machine; the secret is not on its command line. `through` is a command
    that runs it elsewhere, e.g. in another network namespace."""
    process = await asyncio.create_subprocess_exec(
        *through,
        sys.executable,
        "-m",
        "ladderstitch.text.engine.rank",
        address,
        stdin=asyncio.subprocess.DEVNULL,
        env=os.environ | {SECRET_VARIABLE: secret},
    )
    return _Process(process)
