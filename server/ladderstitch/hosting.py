"""What a replica hosts, as the service sees it: models by name, and the say over their schedule."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ladderstitch.bundle import Bundle
from ladderstitch.errors import ModelNotFound, NotReady
from ladderstitch.scheduling.scheduler import Scheduler
from ladderstitch.scheduling.settings import SchedulerSettings


@dataclass(frozen=True, slots=True)
class HostedModel:
    """One loaded bundle and the scheduler that answers for it."""

    bundle: Bundle
    scheduler: Scheduler
    quality: dict[int, float]

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def version(self) -> str:
        return self.bundle.manifest.version


@dataclass(slots=True)
class Host:
    """The models of one replica; `ready` and `draining` are set by the replica as it lives."""

    replica: str
    models: dict[str, HostedModel] = field(default_factory=dict)
    ready: bool = False
    draining: bool = False

    def model(self, name: str, version: str = "") -> HostedModel:
        """Raises `NotReady` while loading, `ModelNotFound` for another name or version."""
        hosted = self.models.get(name)
        if hosted is None or version not in ("", hosted.version):
            if not self.ready:
                raise NotReady("the replica is still loading its models")
            wanted = f"{name!r} version {version}" if version else f"{name!r}"
            known = ", ".join(f"{m.name} (version {m.version})" for m in self.models.values())
            raise ModelNotFound(f"model_name: no model {wanted}; this server has {known}")
        return hosted


PublishSettings = Callable[[str, dict[str, object]], Awaitable[tuple[int, SchedulerSettings]]]
"""(model name, changed fields) -> revision and the settings now in force, on every replica."""
