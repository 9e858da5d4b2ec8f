"""What a replica hosts, as the service sees it: models by name, and the say over their schedule."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ladderstitch.errors import BadInput, ModelNotFound, NotReady
from ladderstitch.scheduling.settings import LiveSettings, SchedulerSettings
from ladderstitch.telemetry.text_metrics import TextMetrics
from ladderstitch.text.bundle import LanguageBundle
from ladderstitch.text.scheduler.scheduler import Generator
from ladderstitch.vision.bundle import Bundle
from ladderstitch.vision.models.route import Stitch
from ladderstitch.vision.preprocessing import ImageReader
from ladderstitch.vision.scheduler.scheduler import Scheduler


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

    @property
    def qualities(self) -> Mapping[int, float]:
        """Of every stitch that it may answer by."""
        return self.scheduler.quality


@dataclass(frozen=True, slots=True, eq=False)
class HostedGenerator:
    """One loaded language model and what generates with it."""

    bundle: LanguageBundle
    generator: Generator
    metrics: TextMetrics
    max_prompt_tokens: int

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def version(self) -> str:
        return self.bundle.manifest.version

    @property
    def qualities(self) -> Mapping[int, float]:
        """Of every path that it may answer by."""
        return self.generator.menu.quality


Hosted = HostedModel | HostedGenerator


UpdateSettings = Callable[[dict[str, Any]], Awaitable[LiveSettings]]
"""Changed fields -> what is in force from then on, here and on every other replica."""


@dataclass(frozen=True, slots=True)
class Control:
    """What an administrator may do to a replica.

    `drain` takes seconds of announcement and tells whether all accepted requests ended, `load`
    takes a bundle's name, `unload` a model's.
    """

    update: UpdateSettings
    drain: Callable[[float], Awaitable[bool]]
    load: Callable[[str], Awaitable[Hosted]]
    unload: Callable[[str], Awaitable[None]]


@dataclass(slots=True)
class Host:
    """The models of one replica; the replica sets the late fields as it comes up and goes down."""

    replica: str
    models: dict[str, HostedModel] = field(default_factory=dict)
    generators: dict[str, HostedGenerator] = field(default_factory=dict)
    ready: bool = False
    leaving: bool = False  # announced, but requests are still accepted
    draining: bool = False
    metrics_port: int = 0
    live: LiveSettings = field(default_factory=lambda: LiveSettings(0, SchedulerSettings()))

    @property
    def serving(self) -> bool:
        """Whether callers should come here."""
        return self.ready and not self.leaving and not self.draining

    @property
    def everything(self) -> dict[str, Hosted]:
        """All models by name, in order of their names."""
        everything: dict[str, Hosted] = {**self.models, **self.generators}
        return dict(sorted(everything.items()))

    def add(self, hosted: Hosted) -> None:
        """Answer by it from now on, also in place of one of the same name."""
        self.remove(hosted.name)
        if isinstance(hosted, HostedModel):
            self.models[hosted.name] = hosted
        else:
            self.generators[hosted.name] = hosted

    def remove(self, name: str) -> None:
        self.models.pop(name, None)
        self.generators.pop(name, None)

    def find(self, name: str, version: str = "") -> Hosted:
        """No name stands for the only model, no version for the loaded one.

        Raises `NotReady` while loading, `ModelNotFound` for another name or version.
        """
        if not self.ready:
            raise NotReady("the replica is still loading its models")
        everything = self.everything
        if not name and len(everything) == 1:
            name = next(iter(everything))
        hosted = everything.get(name)
        if hosted is None or version not in ("", hosted.version):
            wanted = f"{name[:80]!r} version {version[:80]!r}" if version else f"{name[:80]!r}"
            known = ", ".join(f"{m.name!r} (version {m.version})" for m in everything.values())
            raise ModelNotFound(f"model_name: no model {wanted}; this server has {known}")
        return hosted

    def model(self, name: str, version: str = "") -> HostedModel:
        """An image classifier, as `find`; raises `BadInput` for a language model."""
        hosted = self.find(name, version)
        if not isinstance(hosted, HostedModel):
            raise BadInput("model_name", f"{hosted.name!r} generates text: call Generate")
        return hosted

    def generator(self, name: str, version: str = "") -> HostedGenerator:
        """A language model, as `find`; raises `BadInput` for another kind."""
        hosted = self.find(name, version)
        if not isinstance(hosted, HostedGenerator):
            raise BadInput("model_name", f"{hosted.name!r} classifies images: call Infer")
        return hosted


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
