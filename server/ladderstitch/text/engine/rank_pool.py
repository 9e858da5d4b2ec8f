"""Where ranks connect to, and how many stand by: started here or on other machines."""

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

from ladderstitch.errors import LadderstitchError
from ladderstitch.text.engine import wire
from ladderstitch.text.engine.rank_handle import Launcher, RankHandle, RankProcess
from ladderstitch.text.engine.wire import Kind

log = logging.getLogger(__name__)

HELLO_S = 60.0
READ_LIMIT_BYTES = 16 << 20


class RankStartError(LadderstitchError):
    """No rank came forward in time, or the one that was started ended at once."""


class RankPool:
    """Listens for ranks; those that know the secret wait here until a group takes them.

    A rank that was started here says the number of its launch, so that its process is known.
    """

    def __init__(
        self,
        launcher: Launcher | None,
        on_loss: Callable[[RankHandle], None],
        listen: str = "",
        secret: str = "",
    ) -> None:
        """`listen` is HOST:PORT for ranks on other machines; otherwise a socket file is used.
        Without a launcher ranks are started by others (`ladderstitch rank ADDRESS`)."""
        self.secret = secret or secrets.token_hex(32)
        self.address = ""
        self._launcher, self._on_loss, self._listen = launcher, on_loss, listen
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None
        self._waiting: list[RankHandle] = []
        self._starting: dict[int, RankProcess] = {}
        self._numbers = itertools.count(1)
        self._changed = asyncio.Event()
        self._watching: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Raises `OSError` if the address is taken."""
        if self._listen:
            host, port = self._listen.rsplit(":", 1)
            self._server = await asyncio.start_server(
                self._welcome, host, int(port), limit=READ_LIMIT_BYTES
            )
            host, port = self._server.sockets[0].getsockname()[:2]
            self.address = f"{host}:{port}"
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="lsr-"))  # mode 0700
            path = self._folder / "group"
            self._server = await asyncio.start_unix_server(
                self._welcome, path, limit=READ_LIMIT_BYTES
            )
            self.address = f"unix:{path}"

    @property
    def available(self) -> int:
        """Ranks that wait or are on their way."""
        return sum(not member.lost for member in self._waiting) + len(self._starting)

    async def launch(self) -> None:
        """Start one more rank, if that is up to us; it will come forward later."""
        if self._launcher is None:
            return
        number = next(self._numbers)
        launched = await self._launcher(self.address, f"{number}:{self.secret}")
        self._starting[number] = launched
        watch = asyncio.create_task(self._watch(number, launched), name=f"rank-launch-{number}")
        self._watching.add(watch)
        watch.add_done_callback(self._watching.discard)

    async def take(self) -> RankHandle:
        """A rank, started if none stands by. Raises `RankStartError`."""
        if not self.available:
            await self.launch()
        patience = time.monotonic() + HELLO_S
        while True:
            while self._waiting:
                member = self._waiting.pop(0)
                if not member.lost:
                    return member
            if self._launcher is not None and not self._starting:
                raise RankStartError("the rank that was started ended at once; its log says why")
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), patience - time.monotonic())
            except TimeoutError:
                raise RankStartError(f"no rank came forward for {HELLO_S:.0f} s") from None

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for member in self._waiting:
            await member.close()
        for launched in list(self._starting.values()):
            launched.kill()
            await launched.wait()
        for watch in list(self._watching):
            watch.cancel()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _watch(self, number: int, launched: RankProcess) -> None:
        """Notice a rank that ends before it comes forward."""
        await launched.wait()
        if self._starting.pop(number, None) is not None:
            self._changed.set()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = await asyncio.wait_for(wire.read(reader), 10)
            number, _, secret = str(hello.header.get("secret", "")).rpartition(":")
            if hello.kind != Kind.HELLO or not hmac.compare_digest(secret, self.secret):
                raise EOFError("wrong secret")
        except (EOFError, OSError, TimeoutError, ValueError) as error:
            log.warning("turned away a connection that is no rank of ours: %s", error)
            writer.close()
            return
        launched = self._starting.pop(int(number), None) if number.isdigit() else None
        self._waiting.append(RankHandle(reader, writer, hello.header, launched, self._on_loss))
        self._changed.set()
