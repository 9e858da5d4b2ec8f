"""How ranks come to life: as processes of this machine; elsewhere others start them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from ladderstitch.text.engine.rank import SECRET_VARIABLE


class Launched(Protocol):
    """A rank that was started."""

    async def wait(self) -> object:
        """Until it has ended."""

    def kill(self) -> None:
        """End it at once; nothing happens if it has ended."""


class Launcher(Protocol):
    """Starts one rank, which will connect to the group's address and say hello."""

    async def __call__(self, address: str, secret: str) -> Launched: ...


class _Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def wait(self) -> object:
        return await self.process.wait()

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


async def launch_process(address: str, secret: str, *, through: Sequence[str] = ()) -> Launched:
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
