"""The names under which OpenAI's API offers models: those of the models, and of their adapters.

An adapter is a model with a `parent`, as in vLLM. Its name is its own, or MODEL:ADAPTER, which is
listed if another model or adapter has the same name.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from ladderstitch.errors import ModelNotFound
from ladderstitch.hosting.registry import ModelRegistry, TextModel


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model, or one of its adapters, under the name that a request gave it."""

    id: str
    model: TextModel
    variant: int | None = None
    """The path of the adapter; None: the model chooses."""

    @property
    def adapter(self) -> str | None:
        """The name of the adapter in its model, None for a model."""
        return None if self.variant is None else self.model.bundle.manifest.adapters[self.variant]

    def describe(self) -> dict[str, Any]:
        """Return the entry of the list of models."""
        path, variants = self.model.bundle.path, self.model.bundle.manifest.variants
        described = {
            "id": self.id,
            "object": "model",
            "created": int(path.stat().st_mtime),
            "owned_by": "ladderstitch",
            "root": self.model.name,
            "parent": None if self.variant is None else self.model.name,
            "max_model_len": self.model.scheduler.max_tokens,
        }
        if self.variant is None:
            names = {str(number): variant.name for number, variant in enumerate(variants)}
            return described | {"variants": names}
        return described | {"variant_id": self.variant}


def named_models(registry: ModelRegistry) -> list[NamedModel]:
    """Return all models, each followed by its adapters."""
    models = list(registry.text_models.values())
    counts = Counter(registry.models_by_name.keys())
    counts.update(name for m in models for name in m.bundle.manifest.adapters.values())
    found = []
    for model in models:
        found.append(NamedModel(model.name, model))
        for variant, name in model.bundle.manifest.adapters.items():
            listed = name if counts[name] == 1 else f"{model.name}:{name}"
            found.append(NamedModel(listed, model, variant))
    return found


def find_model(registry: ModelRegistry, name: str) -> NamedModel:
    """Return the model or the adapter of a name; a model has priority.

    Raises what `ModelRegistry.text_model` does if there is neither.
    """
    adapters = [named for named in named_models(registry) if named.variant is not None]
    if registry.ready and name not in registry.models_by_name:
        for named in adapters:
            if name in (named.id, f"{named.model.name}:{named.adapter}"):
                return replace(named, id=name)
    try:
        model = registry.text_model(name)
    except ModelNotFound as error:
        listed = "".join(f", adapter {named.id!r}" for named in adapters)
        raise ModelNotFound(f"{error}{listed}") from None
    return NamedModel(model.name, model)
