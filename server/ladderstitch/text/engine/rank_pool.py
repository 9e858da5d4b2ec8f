"""The idle ranks of a group: a socket where ranks register, and ranks that wait to be acquired."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ladderstitch.addresses import join_address, split_address
from ladderstitch.errors import LadderstitchError
from ladderstitch.text.engine.rank_handle import Launcher, RankHandle, RankProcess
from ladderstitch.text.messages import Kind, read_message

log = logging.getLogger(__name__)

REGISTER_TIMEOUT_S = 60.0
"""Seconds that `acquire` waits until a rank has registered."""

HANDSHAKE_TIMEOUT_S = 10.0
"""Seconds that a new connection has for its `REGISTER` message."""

MAX_HANDSHAKE_BYTES = 1 << 16
"""Most bytes of the message of a connection that has not shown the secret yet."""

READ_LIMIT_BYTES = 16 << 20


class RankStartError(LadderstitchError):
    """An error because no rank registered in time, or a started rank exited before it did."""


class RankPool:
    """The listener for ranks, and the registered ranks that no group has acquired yet.

    A rank must know the secret. A rank that the pool started also sends the number of its launch,
    by which the pool finds its process.
    """

    def __init__(
        self,
        launcher: Launcher | None,
        on_loss: Callable[[RankHandle], None],
        listen: str = "",
        secret: str = "",
    ) -> None:
        """Prepare the pool without opening its socket.

        `listen` is HOST:PORT for ranks on other machines; unset: a socket file. Without a launcher,
        an operator starts the ranks (`ladderstitch rank ADDRESS`). `secret` unset: a random one.
        """
        self.secret = secret or secrets.token_hex(32)
        self.address = ""
        self._launcher, self._on_loss, self._listen = launcher, on_loss, listen
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None
        self._idle: list[RankHandle] = []
        self._starting: dict[int, RankProcess] = {}
        self._launch_numbers = itertools.count(1)
        self._changed = asyncio.Event()
        self._watch_tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Open the socket; raises `OSError` if the address is in use."""
        if self._listen:
            host, port = split_address(self._listen)
            self._server = await asyncio.start_server(
                self._register, host, port, limit=READ_LIMIT_BYTES
            )
            self.address = join_address(*self._server.sockets[0].getsockname()[:2])
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="lsr-"))  # mode 0700
            path = self._folder / "group"
            self._server = await asyncio.start_unix_server(
                self._register, path, limit=READ_LIMIT_BYTES
            )
            self.address = f"unix:{path}"

    @property
    def available(self) -> int:
        """The number of ranks that are idle or starting."""
        return sum(not rank.lost for rank in self._idle) + len(self._starting)

    @property
    def can_launch(self) -> bool:
        """Whether the pool starts ranks itself."""
        return self._launcher is not None

    async def launch(self) -> None:
        """Start one more rank, which registers later; do nothing without a launcher."""
        if self._launcher is None:
            return
        number = next(self._launch_numbers)
        process = await self._launcher(self.address, f"{number}:{self.secret}")
        self._starting[number] = process
        watch = asyncio.create_task(self._watch(number, process), name=f"rank-launch-{number}")
        self._watch_tasks.add(watch)
        watch.add_done_callback(self._watch_tasks.discard)

    async def acquire(self) -> RankHandle:
        """Return an idle rank; start one and wait for it if none is available.

        Raises `RankStartError` if no rank registers within `REGISTER_TIMEOUT_S`, or if the started
        rank exits.
        """
        if not self.available:
            await self.launch()
        deadline = time.monotonic() + REGISTER_TIMEOUT_S
        while True:
            while self._idle:
                rank = self._idle.pop(0)
                if not rank.lost:
                    return rank
            if self._launcher is not None and not self._starting:
                raise RankStartError("the rank exited before it registered; see its log")
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                raise RankStartError(
                    f"no rank registered within {REGISTER_TIMEOUT_S:.0f} s"
                ) from None

    async def close(self) -> None:
        """Close the socket and end all idle and starting ranks."""
        if self._server is not None:
            self._server.close()
        for rank in self._idle:
            await rank.close()
        for process in list(self._starting.values()):
            process.kill()
            await process.wait()
        for watch in list(self._watch_tasks):
            watch.cancel()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _watch(self, number: int, process: RankProcess) -> None:
        """Wake `acquire` if a rank exits before it registers."""
        try:
            await process.wait()
        finally:
            if self._starting.pop(number, None) is not None:
                self._changed.set()

    async def _register(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            handshake = read_message(reader, MAX_HANDSHAKE_BYTES)
            message = await asyncio.wait_for(handshake, HANDSHAKE_TIMEOUT_S)
            number, _, secret = str(message.header.get("secret", "")).rpartition(":")
            same = hmac.compare_digest(secret.encode(), self.secret.encode())
            if message.kind != Kind.REGISTER or not same:
                raise EOFError("wrong secret")
        except Exception as error:  # whatever a stranger sends
            log.warning("rejected a connection that did not register as a rank: %s", error)
            writer.close()
            return
        process = self._starting.pop(int(number), None) if number.isdigit() else None
        self._idle.append(RankHandle(reader, writer, message.header, process, self._on_loss))
        self._changed.set()
