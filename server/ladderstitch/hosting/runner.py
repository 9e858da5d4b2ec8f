"""What a replica needs of a model, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ladderstitch.scheduling.settings import SchedulerSettings

Advance = Callable[[int, int], None]
"""(done, total) of the warm-up."""


class Runner(Protocol):
    """Runs one bundle and puts its model into the replica's `Host`."""

    @property
    def name(self) -> str:
        """The model's."""

    @property
    def healthy(self) -> bool:
        """Whether everything that computes is up."""

    @property
    def alive(self) -> bool:
        """Whether requests are being answered, or will be once what computes is back."""

    async def start(self, advance: Advance) -> None:
        """Load and warm up."""

    def set_ready(self, ready: bool) -> None:
        """Say so in the metrics."""

    def apply(self, settings: SchedulerSettings) -> None:
        """Schedule by these from now on."""

    async def drain(self) -> None:
        """Refuse what is new, finish what was accepted."""

    async def close(self) -> None:
        """End what computes; what is unfinished by now ends with an error."""
