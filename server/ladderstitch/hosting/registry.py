"""What a replica hosts, as the service sees it: models by name, and the say over their schedule."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ladderstitch.errors import InvalidArgument, ModelNotFound, NotReady
from ladderstitch.scheduling.settings import ActiveSettings, SchedulerSettings
from ladderstitch.telemetry.text_metrics import TextMetrics
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.vision.bundle import Bundle
from ladderstitch.vision.models.route import Stitch
from ladderstitch.vision.preprocessing import ImageReader
from ladderstitch.vision.scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True, eq=False)
class VisionModel:
    """One loaded bundle and the scheduler that answers for it."""

    bundle: Bundle
    scheduler: Scheduler
    reader: ImageReader
    variants: dict[int, Stitch]

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def version(self) -> str:
        return self.bundle.manifest.version

    @property
    def qualities(self) -> Mapping[int, float]:
        """Of every variant that it may answer by."""
        return self.scheduler.quality


@dataclass(frozen=True, slots=True, eq=False)
class TextModel:
    """One loaded language model and what generates with it."""

    bundle: TextBundle
    scheduler: TextScheduler
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
        return self.scheduler.candidates.quality


LoadedModel = VisionModel | TextModel


UpdateSettings = Callable[[dict[str, Any]], Awaitable[ActiveSettings]]
"""Changed fields -> what is in force from then on, here and on every other replica."""


@dataclass(frozen=True, slots=True)
class AdminActions:
    """What an administrator may do to a replica.

    `drain` takes seconds of announcement and tells whether all accepted requests ended, `load`
    takes a bundle's name, `unload` a model's.
    """

    update: UpdateSettings
    drain: Callable[[float], Awaitable[bool]]
    load: Callable[[str], Awaitable[LoadedModel]]
    unload: Callable[[str], Awaitable[None]]


@dataclass(slots=True)
class ModelRegistry:
    """The models of one replica; the replica sets the late fields as it comes up and goes down."""

    replica: str
    vision_models: dict[str, VisionModel] = field(default_factory=dict)
    text_models: dict[str, TextModel] = field(default_factory=dict)
    ready: bool = False
    leaving: bool = False  # announced, but requests are still accepted
    draining: bool = False
    metrics_port: int = 0
    active_settings: ActiveSettings = field(
        default_factory=lambda: ActiveSettings(0, SchedulerSettings())
    )

    @property
    def serving(self) -> bool:
        """Whether callers should come here."""
        return self.ready and not self.leaving and not self.draining

    @property
    def models_by_name(self) -> dict[str, LoadedModel]:
        """All models by name, in order of their names."""
        models: dict[str, LoadedModel] = {**self.vision_models, **self.text_models}
        return dict(sorted(models.items()))

    def add(self, hosted: LoadedModel) -> None:
        """Answer by it from now on, also in place of one of the same name."""
        self.remove(hosted.name)
        if isinstance(hosted, VisionModel):
            self.vision_models[hosted.name] = hosted
        else:
            self.text_models[hosted.name] = hosted

    def remove(self, name: str) -> None:
        self.vision_models.pop(name, None)
        self.text_models.pop(name, None)

    def find(self, name: str, version: str = "") -> LoadedModel:
        """No name stands for the only model, no version for the loaded one.

        Raises `NotReady` while loading, `ModelNotFound` for another name or version.
        """
        if not self.ready:
            raise NotReady("the replica is still loading its models")
        everything = self.models_by_name
        if not name and len(everything) == 1:
            name = next(iter(everything))
        hosted = everything.get(name)
        if hosted is None or version not in ("", hosted.version):
            wanted = f"{name[:80]!r} version {version[:80]!r}" if version else f"{name[:80]!r}"
            known = ", ".join(f"{m.name!r} (version {m.version})" for m in everything.values())
            raise ModelNotFound(f"model_name: no model {wanted}; this server has {known}")
        return hosted

    def vision_model(self, name: str, version: str = "") -> VisionModel:
        """An image classifier, as `find`; raises `InvalidArgument` for a language model."""
        hosted = self.find(name, version)
        if not isinstance(hosted, VisionModel):
            raise InvalidArgument("model_name", f"{hosted.name!r} generates text: call Generate")
        return hosted

    def text_model(self, name: str, version: str = "") -> TextModel:
        """A language model, as `find`; raises `InvalidArgument` for another kind."""
        hosted = self.find(name, version)
        if not isinstance(hosted, TextModel):
            raise InvalidArgument("model_name", f"{hosted.name!r} classifies images: call Infer")
        return hosted


ProgressCallback = Callable[[int, int], None]
"""(done, total) of the warm-up."""


class Runner(Protocol):
    """Runs one bundle and puts its model into the replica's `ModelRegistry`."""

    @property
    def name(self) -> str:
        """The model's."""

    @property
    def healthy(self) -> bool:
        """Whether everything that computes is up."""

    @property
    def alive(self) -> bool:
        """Whether requests are being answered, or will be once what computes is back."""

    async def start(self, advance: ProgressCallback) -> None:
        """Load and warm up."""

    def set_ready(self, ready: bool) -> None:
        """Say so in the metrics."""

    def apply(self, settings: SchedulerSettings) -> None:
        """Schedule by these from now on."""

    async def drain(self) -> None:
        """Refuse what is new, finish what was accepted."""

    async def close(self) -> None:
        """End what computes; what is unfinished by now ends with an error."""
