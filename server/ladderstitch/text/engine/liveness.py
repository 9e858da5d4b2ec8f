"""The time limits by which a group recognises a rank that hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LOAD_LIMIT_S = 3600.0
"""Seconds that a rank may take to load its shard."""
CONNECT_LIMIT_S, CONNECT_GPU_LIMIT_S = 30.0, 120.0
"""Seconds that ranks may take to connect a new communicator."""
UNPLANNED_LIMIT_S, UNPLANNED_GPU_LIMIT_S = 300.0, 900.0
"""Seconds of a pass whose time is not known yet; on a GPU, kernels may be compiled in it."""
GPU_FLOOR_S = 60.0
"""Smallest limit on a GPU, where the first pass of a shape compiles its kernels."""
GRACE_S = 1.0
"""Seconds after a limit in which replies still count.

If this process itself was stopped, the replies are there, but have not been read.
"""


@dataclass(frozen=True, slots=True)
class Liveness:
    """The limits of a pass, from its planned seconds, and of the check of an idle group."""

    floor_s: float = 5.0
    """Smallest limit, seconds."""
    factor: float = 5.0
    """Limit of a pass over its planned seconds."""
    slow_s: float = 1.0
    """Seconds without a reply, or twice the planned ones, after which a group is not healthy."""
    idle_check_s: float = 0.5
    """Seconds between two checks of an idle group."""
    abort_s: float = 5.0
    """Seconds that the other ranks have to abort a reduction before they are restarted, too."""

    def limit_s(self, planned_s: float | None, device: str = "cpu") -> float:
        """Return the seconds after which a pass counts as hung; `planned_s` None: not known."""
        on_cpu = device == "cpu"
        if planned_s is None:
            return max(UNPLANNED_LIMIT_S if on_cpu else UNPLANNED_GPU_LIMIT_S, self.floor_s)
        floor_s = self.floor_s if on_cpu else max(self.floor_s, GPU_FLOOR_S)
        return max(floor_s, self.factor * planned_s)

    def slow_after_s(self, planned_s: float | None, device: str = "cpu") -> float:
        """Return the seconds after which a pass is slower than planned."""
        limit_s = self.limit_s(planned_s, device)
        if planned_s is None or device != "cpu":
            return limit_s
        return min(limit_s, max(self.slow_s, 2 * planned_s))


async def wait_until_done(
    pending: asyncio.Future[Any],
    slow_after_s: float,
    limit_s: float,
    on_slow: Callable[[], None] = lambda: None,
) -> bool:
    """Wait for a future for at most `limit_s` and `GRACE_S`; return whether it is done.

    `on_slow` is called if it is not done after `slow_after_s`.
    """
    await asyncio.wait({pending}, timeout=slow_after_s)
    if not pending.done():
        on_slow()
        await asyncio.wait({pending}, timeout=limit_s - slow_after_s)
    if not pending.done():
        await asyncio.wait({pending}, timeout=min(GRACE_S, limit_s))
    return pending.done()
