"""A second host on this machine: a network namespace, connected by a pair of veth devices."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from ladderstitch.text.engine.rank_handle import RankProcess, launch_process

HERE, THERE = "10.213.7.1", "10.213.7.2"


@contextmanager
def second_host() -> Iterator[str]:
    """Yield the name of a new namespace, which is deleted afterwards.

    Raises `OSError` if the kernel or the user's rights do not allow one.
    """
    if shutil.which("ip") is None:
        raise OSError("ip: command not found")
    name, near, far = (f"ls{kind}{os.getpid()}" for kind in ("", "a", "b"))
    _ip("netns", "add", name)
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _ip("addr", "add", f"{HERE}/30", "dev", near)
        _ip("link", "set", near, "up")
        for command in (("addr", "add", f"{THERE}/30", "dev", far), ("link", "set", far, "up")):
            _ip("-n", name, *command)
        yield name
    finally:
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class AlternatingLauncher:
    """A launcher that starts every second rank on the second host."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._turns = itertools.cycle((False, True))

    async def __call__(self, address: str, secret: str) -> RankProcess:
        """Start a rank on the next host in turn."""
        through = ("ip", "netns", "exec", self._namespace) if next(self._turns) else ()
        return await launch_process(address, secret, through=through)
