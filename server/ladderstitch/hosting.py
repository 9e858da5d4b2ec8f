"""What a replica hosts, as the service sees it: models by name, and the say over their schedule."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ladderstitch.bundle import Bundle
from ladderstitch.errors import ModelNotFound, NotReady
from ladderstitch.images import ImageReader
from ladderstitch.models.route import Stitch
from ladderstitch.scheduling.scheduler import Scheduler
from ladderstitch.scheduling.settings import SchedulerSettings


@dataclass(frozen=True, slots=True, eq=False)
class HostedModel:
    """One loaded bundle and the scheduler that answers for it."""

    bundle: Bundle
    scheduler: Scheduler
    reader: ImageReader
    stitches: dict[int, Stitch]

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def version(self) -> str:
        return self.bundle.manifest.version


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """The scheduling in force, and how many changes led to it."""

    revision: int
    settings: SchedulerSettings


UpdateSettings = Callable[[dict[str, Any]], Awaitable[LiveSettings]]
"""Changed fields -> what is in force from then on, here and on every other replica."""


@dataclass(slots=True)
class Host:
    """The models of one replica; the replica sets the late fields as it comes up and goes down."""

    replica: str
    models: dict[str, HostedModel] = field(default_factory=dict)
    ready: bool = False
    draining: bool = False
    live: LiveSettings = field(default_factory=lambda: LiveSettings(0, SchedulerSettings()))

    def model(self, name: str, version: str = "") -> HostedModel:
        """No name stands for the only model, no version for the loaded one.

        Raises `NotReady` while loading, `ModelNotFound` for another name or version.
        """
        if not self.ready:
            raise NotReady("the replica is still loading its models")
        if not name and len(self.models) == 1:
            name = next(iter(self.models))
        hosted = self.models.get(name)
        if hosted is None or version not in ("", hosted.version):
            wanted = f"{name[:80]!r} version {version[:80]!r}" if version else f"{name[:80]!r}"
            known = ", ".join(f"{m.name!r} (version {m.version})" for m in self.models.values())
            raise ModelNotFound(f"model_name: no model {wanted}; this server has {known}")
        return hosted
