"""The models that a replica hosts, the actions on them, and the runners that serve them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ladderstitch.errors import InvalidArgument, ModelNotFound, NotReady
from ladderstitch.hosting.answer_limit import AnswerLimit
from ladderstitch.runtime import ProgressCallback
from ladderstitch.scheduling.settings import ActiveSettings, SchedulerSettings
from ladderstitch.telemetry.text_metrics import TextMetrics
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.chat_template import ChatTemplate, Message
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models.route import Stitch
from ladderstitch.vision.scheduler.scheduler import Scheduler
from ladderstitch.vision.tensor_inputs import TensorReader

MAX_CHARACTERS_PER_TOKEN = 64
"""Characters per token of `max_prompt_tokens` above which a prompt is not tokenised."""


@dataclass(frozen=True, slots=True, eq=False)
class VisionModel:
    """A loaded image model: its bundle and the scheduler that answers its requests.

    Most classify images. Others return tensors, or take them, as their manifests say.
    """

    bundle: VisionBundle
    scheduler: Scheduler
    reader: TensorReader
    variants: dict[int, Stitch]
    variant_names: dict[int, str]
    limit: AnswerLimit

    @property
    def name(self) -> str:
        """The name that requests select the model by."""
        return self.bundle.manifest.name

    @property
    def version(self) -> str:
        """The version of the bundle."""
        return self.bundle.manifest.version

    @property
    def qualities(self) -> Mapping[int, float]:
        """The quality of each variant that an answer may use."""
        return self.scheduler.planner.quality

    @property
    def settings(self) -> SchedulerSettings:
        """The settings that the scheduler uses: the last ones that fitted the model."""
        return self.scheduler.planner.settings


@dataclass(frozen=True, slots=True, eq=False)
class TextModel:
    """A loaded language model: its bundle and the scheduler that answers its requests."""

    bundle: TextBundle
    scheduler: TextScheduler
    metrics: TextMetrics
    max_prompt_tokens: int
    chat_template: ChatTemplate | None = None
    """None if the model has none, and answers completions only."""

    @property
    def name(self) -> str:
        """The name that requests select the model by."""
        return self.bundle.manifest.name

    @property
    def version(self) -> str:
        """The version of the bundle."""
        return self.bundle.manifest.version

    @property
    def qualities(self) -> Mapping[int, float]:
        """The quality of each variant that an answer may use."""
        return self.scheduler.candidates.quality

    @property
    def settings(self) -> SchedulerSettings:
        """The settings that the scheduler uses: the last ones that fitted the model."""
        return self.scheduler.settings

    def tokenise(self, field: str, text: str) -> tuple[int, ...]:
        """Return the tokens of a prompt.

        Raises `InvalidArgument`, which names `field`, if it is too long. Tokenising runs on the
        event loop, so texts that cannot fit are rejected before it.
        """
        limit = MAX_CHARACTERS_PER_TOKEN * self.max_prompt_tokens
        if len(text) > limit:
            raise InvalidArgument(field, f"expected at most {limit} characters, got {len(text)}")
        tokens = tuple(self.scheduler.tokenizer.encode(text))
        self.check_prompt_length(tokens)
        return tokens

    async def tokenise_chat(
        self,
        messages: Sequence[Message],
        *,
        allow_control_tokens: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        beginning: str = "",
    ) -> tuple[int, ...]:
        """Return the tokens of a conversation, after which the model writes the next message.

        The template reads `tools`. The next message begins with `beginning`. Control tokens in the
        messages are plain text unless they are allowed. Raises `InvalidArgument` if the model has
        no chat template, if the template rejects the messages, or if they are too long.
        """
        if self.chat_template is None:
            message = "this model has no chat template; use completions"
            raise InvalidArgument("messages", message)
        limit = MAX_CHARACTERS_PER_TOKEN * self.max_prompt_tokens
        got = sum(len(str(m["content"])) + len(str(m.get("tool_calls", ""))) for m in messages)
        if got > limit:
            raise InvalidArgument("messages", f"expected at most {limit} characters, got {got}")
        if (got := len(str(tools or ""))) > limit:
            raise InvalidArgument("tools", f"expected at most {limit} characters, got {got}")
        variables = {} if tools is None else {"tools": list(tools)}
        tokens = await self.chat_template.encode(
            messages, allow_control_tokens=allow_control_tokens, beginning=beginning, **variables
        )
        self.check_prompt_length(tokens)
        return tuple(tokens)

    def check_prompt_length(self, tokens: Sequence[int]) -> None:
        """Raise `InvalidArgument` if a prompt has more than `max_prompt_tokens`."""
        if len(tokens) > self.max_prompt_tokens:
            raise InvalidArgument(
                "prompt", f"expected at most {self.max_prompt_tokens} tokens, got {len(tokens)}"
            )


LoadedModel = VisionModel | TextModel


UpdateSettings = Callable[[dict[str, Any]], Awaitable[ActiveSettings]]
"""Applies changed fields on this and all other replicas; returns the settings active then."""


@dataclass(frozen=True, slots=True)
class AdminActions:
    """The actions of an administrator on a replica."""

    update: UpdateSettings
    drain: Callable[[float], Awaitable[bool]]
    """Takes the seconds to announce the drain; returns whether all accepted requests ended."""
    load: Callable[[str], Awaitable[LoadedModel]]
    """Takes the name of a bundle."""
    unload: Callable[[str], Awaitable[None]]
    """Takes the name of a model."""


@dataclass(slots=True)
class ModelRegistry:
    """The models of one replica and its state, which the replica sets as it starts and stops."""

    replica: str
    vision_models: dict[str, VisionModel] = field(default_factory=dict)
    text_models: dict[str, TextModel] = field(default_factory=dict)
    ready: bool = False
    healthy: bool = True
    """Whether all models answer requests now; the replica's watchdog sets it."""
    drain_announced: bool = False
    """Whether the replica reports NOT_SERVING while it still accepts requests."""
    draining: bool = False
    http_port: int = 0
    """Bound port of the HTTP API; 0: there is none."""
    metrics_port: int = 0
    active_settings: ActiveSettings = field(
        default_factory=lambda: ActiveSettings(0, SchedulerSettings())
    )
    """The settings of all models, except of those in `unfit_models`."""

    @property
    def serving(self) -> bool:
        """Whether callers should send requests to this replica."""
        return not self.why_not_serving()

    def why_not_serving(self) -> str:
        """Return why callers should not send requests now; empty if they should."""
        if self.drain_announced or self.draining:
            return "the replica is draining"
        if not self.ready:
            return "the replica is loading its models"
        return "" if self.healthy else "a model does not answer now; its engine is being restarted"

    @property
    def models_by_name(self) -> dict[str, LoadedModel]:
        """All models by name, sorted by name."""
        models: dict[str, LoadedModel] = {**self.vision_models, **self.text_models}
        return dict(sorted(models.items()))

    @property
    def unfit_models(self) -> list[str]:
        """Names of the models that the active settings do not fit; they keep their last ones."""
        active = self.active_settings.settings
        return [name for name, model in self.models_by_name.items() if model.settings != active]

    def add(self, model: LoadedModel) -> None:
        """Add a model; it replaces a model of the same name."""
        self.remove(model.name)
        if isinstance(model, VisionModel):
            self.vision_models[model.name] = model
        else:
            self.text_models[model.name] = model

    def remove(self, name: str) -> None:
        """Remove the model of a name if there is one."""
        self.vision_models.pop(name, None)
        self.text_models.pop(name, None)

    def find(self, name: str, version: str = "") -> LoadedModel:
        """Return a model by name and version.

        An empty name selects the only model, an empty version the loaded one. Raises `NotReady`
        while the replica is loading, and `ModelNotFound` for another name or version.
        """
        if not self.ready:
            raise NotReady("the replica is still loading its models")
        models = self.models_by_name
        if not name and len(models) == 1:
            name = next(iter(models))
        model = models.get(name)
        if model is None or version not in ("", model.version):
            wanted = f"{name[:80]!r} version {version[:80]!r}" if version else f"{name[:80]!r}"
            known = ", ".join(f"{m.name!r} (version {m.version})" for m in models.values())
            known = known or "no models"
            raise ModelNotFound(f"model_name: no model {wanted}; this server has {known}")
        return model

    def vision_model(
        self, name: str, version: str = "", *, instead: str = "Generate"
    ) -> VisionModel:
        """Return an image classifier as `find` does.

        Raises `InvalidArgument` if the model is a language model; callers should call the method
        `instead`.
        """
        model = self.find(name, version)
        if not isinstance(model, VisionModel):
            raise InvalidArgument("model_name", f"{model.name!r} generates text: call {instead}")
        return model

    def text_model(self, name: str, version: str = "") -> TextModel:
        """Return a language model as `find` does.

        Raises `InvalidArgument` if the model is an image classifier.
        """
        model = self.find(name, version)
        if not isinstance(model, TextModel):
            raise InvalidArgument("model_name", f"{model.name!r} classifies images: call Infer")
        return model


Rehearse = Callable[[LoadedModel], Awaitable[None]]
"""Sends requests to the twin of a model, before the model gets those of callers."""


class Runner(Protocol):
    """The engine and the scheduler of one bundle.

    A runner adds its model to the `ModelRegistry` of the replica when it starts.
    """

    @property
    def name(self) -> str:
        """The name of the model."""

    @property
    def healthy(self) -> bool:
        """Whether every worker or rank is up."""

    @property
    def alive(self) -> bool:
        """Whether requests are answered, or will be once the engine has recovered."""

    async def start(self, on_progress: ProgressCallback, rehearse: Rehearse) -> None:
        """Load the model, warm it up and add it to the registry.

        `rehearse` gets a twin of the model, with a scheduler of its own.
        """

    def set_ready(self, ready: bool) -> None:
        """Report in the metrics whether the model answers requests."""

    def apply_settings(self, settings: SchedulerSettings) -> None:
        """Schedule by these settings from now on.

        Raises `InvalidArgument` if they do not fit the model.
        """

    async def drain(self) -> None:
        """Reject new requests, and return when all accepted ones have ended."""

    async def close(self) -> None:
        """Stop the engine; requests that have not ended get an error."""
