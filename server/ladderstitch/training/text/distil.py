"""Retrain layers of another scheme to predict what the standard model predicts (1503.02531).

The layers below the first of them are equal in both models and never change. Their output is
therefore computed once and stored on disk, together with the standard model's final hidden state.
An epoch then runs the other layers only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.residual import Groups, LayerPlan, ResidualScheme, plan_layers
from ladderstitch.training.text.trainable_llama import LowRank, StreamState, TrainableLlama

CHUNK = 256
"""Number of rows of logits in memory at a time, limited because the vocabulary is large."""
SAVE_STEPS = 20


@dataclass(frozen=True, slots=True)
class Distillation:
    """The inputs of a retraining: `model` has bfloat16 matrices; it changes `adapters` in place."""

    model: TrainableLlama
    plans: Sequence[LayerPlan]
    adapters: Mapping[str, LowRank]
    recipe: ConversionRecipe
    folder: Path

    @property
    def first_layer(self) -> int:
        """Number of the lowest layer of the new scheme."""
        return self.recipe.changed_layers(self.model.config.layers)[0]

    def targets_file(self, number: int) -> Path:
        """Return the file with the inputs and targets of a batch."""
        return self.folder / f"targets-{number:05d}.safetensors"

    @property
    def checkpoint(self) -> Path:
        """File with the state after the last saved step."""
        return self.folder / "checkpoint.pt"


def prepare_targets(work: Distillation, text: Tensor, progress: Progress) -> int:
    """Write the targets of every batch of windows [W, T + 1]; return the number of batches.

    Batches whose file exists are skipped.
    """
    batches = torch.split(text[:, :-1], work.recipe.batch_windows)
    layers, first = work.model.config.layers, work.first_layer
    standard = plan_layers(ResidualScheme(), layers, 1)
    task = progress.add_task("predictions of the standard model", total=len(batches))
    for number, tokens in enumerate(batches):
        file = work.targets_file(number)
        if not file.exists():
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                shared = work.model.run(work.model.embed(tokens), range(first), standard)
                final = work.model.run(shared, range(first, layers), standard)
                hidden = work.model.final_hidden(final)
            tensors = {"lagged": shared.lagged, "last": shared.last, "final_hidden": hidden}
            partial = file.with_suffix(".partial")
            save_file({k: v.bfloat16().contiguous() for k, v in tensors.items()}, partial)
            partial.replace(file)
        progress.advance(task)
    return len(batches)


def distil(work: Distillation, batches: int, progress: Progress) -> None:
    """Train the adapters on the targets of all batches, from the checkpoint if there is one.

    One line per step goes to `log.jsonl`.
    """
    recipe = work.recipe
    modules = nn.ModuleDict({n.replace(".", "/"): a for n, a in work.adapters.items()})
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    total = recipe.epochs * batches
    done = _load_checkpoint(work, modules, optimizer)
    order = torch.randperm(batches, generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    task = progress.add_task(f"retraining {recipe.name}", total=total, completed=done)
    for step in range(done, total):
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate_factor(step, total, recipe.warmup_steps)
        optimizer.zero_grad()
        loss = _backward(work, load_file(work.targets_file(order[step % batches])))
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        row = {"step": step + 1, "divergence": round(loss, 4)}
        row["seconds"] = round(time.monotonic() - started, 2)
        with (work.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        progress.update(task, advance=1, description=f"retraining {recipe.name}: {loss:.3f}")
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == total:
            _save_checkpoint(work, step + 1, modules, optimizer)


def _backward(work: Distillation, targets: Mapping[str, Tensor]) -> float:
    """Accumulate the gradients of a batch; return its mean divergence KL(standard || new)."""
    stream = StreamState(targets["lagged"].float(), targets["last"].float())
    layers = range(work.first_layer, work.model.config.layers)
    with torch.autocast("cpu", torch.bfloat16):
        final = work.model.run(stream, layers, work.plans, work.adapters)
        hidden = work.model.final_hidden(final)
    total, gradient = divergence(hidden.detach(), targets["final_hidden"], work.model.head)
    torch.autograd.backward(hidden, gradient)
    return total


def divergence(changed: Tensor, standard: Tensor, head: Tensor) -> tuple[float, Tensor]:
    """Return the mean divergence KL(standard || changed) in nats, and its gradient to `changed`.

    `changed` and `standard` are final hidden states [B, T, D]; `head` is the output layer [V, D].
    """
    rows, standard_rows = changed.flatten(0, -2), standard.flatten(0, -2)
    gradient, total = torch.empty_like(rows), 0.0
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            log_q = F.linear(rows[part], head).float().log_softmax(-1)
            log_p = F.linear(standard_rows[part], head).float().log_softmax(-1)
            ratio, p = log_p - log_q, log_p.exp_()
            total += float(torch.dot(p.flatten(), ratio.flatten()))
            # The gradient to the logits is q - p; written in place, as rows are long.
            gradient[part] = F.linear(log_q.exp_().sub_(p), head.T)
    return total / len(rows), gradient.div_(len(rows)).view(changed.shape)


def _rate_factor(step: int, total: int, warmup: int) -> float:
    """Return the factor on the learning rate: linear warm-up, then a cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    phase = (step - warmup) / max(1, total - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * phase))


def _save_checkpoint(
    work: Distillation, steps: int, modules: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write the checkpoint; the previous one stays until the new one is complete."""
    partial = work.checkpoint.with_suffix(".partial")
    state = {"steps": steps, "model": modules.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, partial)
    partial.replace(work.checkpoint)


def _load_checkpoint(
    work: Distillation, modules: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load the checkpoint, if there is one; return the number of steps done."""
    if not work.checkpoint.exists():
        return 0
    state = torch.load(work.checkpoint, weights_only=True)
    modules.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["steps"])


def create_adapters(
    shapes: Mapping[str, Sequence[int]], layers: Sequence[int], rank: int, seed: int
) -> dict[str, LowRank]:
    """Return an adapter for every tensor of these layers, by the tensor's name."""
    random = torch.Generator().manual_seed(seed)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    chosen = sorted(name for name in shapes if name.startswith(prefixes))
    return {name: LowRank(shapes[name], rank, random) for name in chosen}


def delta_tensors(adapters: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return the adapters as the half-precision tensors of a bundle's delta file."""
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"{name}.up"] = adapter.up.detach().half().contiguous()
        if adapter.down is not None:
            tensors[f"{name}.down"] = adapter.down.detach().half().contiguous()
    return tensors


class ConversionRecipe(BaseModel):
    """The recipe of a conversion: ladder layers or groups, and the schedule of their retraining."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="name of the new path")
    ladder_layers: int | None = Field(
        None, gt=0, description="number of ladder layers, counted from the last layer"
    )
    groups: Groups | None = Field(
        None, min_length=1, description="first layer and number of layers of each group"
    )
    retrained: Literal["changed", "following"] = Field(
        "changed",
        description="layers that learn: those of the new scheme, or all from the first of them on",
    )
    rank: int = Field(32, gt=0, description="rank of the additions to the matrices of these layers")
    fitted_tokens: int = Field(
        0,
        ge=0,
        description="groups: training tokens on which the additions are first fitted in closed "
        "form; 0: they begin at zero",
    )
    tokens: int = Field(gt=0, description="training tokens, the same in every epoch")
    window: int = Field(256, gt=1, description="tokens per sequence")
    batch_windows: int = Field(8, gt=0)
    epochs: int = Field(1, ge=0, description="0: groups are fitted only")
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(10, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    seed: int = 0
    held_out_tokens: int = Field(8192, gt=0, description="tokens for the measurement of quality")
    held_out_window: int = Field(512, gt=1)
    untrained: tuple[int, ...] = Field(
        (), description="ladder layer counts to measure without training, for comparison"
    )

    @model_validator(mode="after")
    def _check(self) -> ConversionRecipe:
        if (self.ladder_layers is None) == (self.groups is None):
            raise ValueError("ladder_layers, groups: expected one of the two")
        if self.groups is not None and all(size < 2 for _, size in self.groups):
            raise ValueError(f"groups: expected one of at least 2 layers, got {self.groups}")
        if not self.epochs and not self.fitted_tokens:
            raise ValueError("epochs: expected at least 1 without fitted_tokens, got 0")
        if self.fitted_tokens and self.groups is None:
            raise ValueError("fitted_tokens: expected 0 for ladder layers, which cannot be fitted")
        return self

    @property
    def residual(self) -> ResidualScheme:
        """The residual scheme of the new path."""
        if self.groups is not None:
            return ResidualScheme(scheme="groups", groups=self.groups)
        return ResidualScheme(scheme="ladder", ladder_layers=self.ladder_layers)

    def changed_layers(self, layers: int) -> list[int]:
        """Return the layers of a model of that many which the scheme changes, in order."""
        if self.groups is not None:
            grouped = [range(first, first + size) for first, size in self.groups if size > 1]
            return sorted(layer for group in grouped for layer in group)
        assert self.ladder_layers is not None, "one of the two fields is set"
        return list(range(layers - self.ladder_layers, layers))

    def retrained_layers(self, layers: int) -> list[int]:
        """Return the layers of a model of that many which get additions, in order."""
        changed = self.changed_layers(layers)
        return changed if self.retrained == "changed" else list(range(changed[0], layers))

    @classmethod
    def load(cls, path: Path) -> ConversionRecipe:
        """Return the recipe in a YAML file; raises `ConfigError` that names the wrong field."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error
