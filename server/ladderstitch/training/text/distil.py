"""Retrains ladder layers to predict what the standard model predicts (arXiv 1503.02531).

The layers below are the same for both and never change, so their output is computed once and kept
on disk, with what the standard model makes of it; an epoch then runs the ladder layers only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.residual import LayerPlan, ResidualScheme, plan_layers
from ladderstitch.training.text.trainable_llama import LowRank, StreamState, TrainableLlama

CHUNK = 256
"""Rows of logits that are in memory at a time: the vocabulary is wide."""
SAVE_STEPS = 20


@dataclass(frozen=True, slots=True)
class Distillation:
    """One retraining: `model` has its matrices in bfloat16, `adapters` are changed in place."""

    model: TrainableLlama
    plans: Sequence[LayerPlan]
    adapters: Mapping[str, LowRank]
    recipe: LadderRecipe
    folder: Path

    @property
    def first(self) -> int:
        """The lowest ladder layer."""
        return self.model.config.layers - self.recipe.ladder_layers

    def lesson(self, number: int) -> Path:
        return self.folder / f"lesson-{number:05d}.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"


def prepare(work: Distillation, text: Tensor, progress: Progress) -> int:
    """Write a lesson for every batch of windows [W, T + 1] that lacks one; how many there are."""
    batches = torch.split(text[:, :-1], work.recipe.batch_windows)
    layers = work.model.config.layers
    standard = plan_layers(ResidualScheme(), layers, 1)
    task = progress.add_task("what the standard model says", total=len(batches))
    for number, tokens in enumerate(batches):
        if not work.lesson(number).exists():
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                shared = work.model.run(work.model.embed(tokens), range(work.first), standard)
                whole = work.model.run(shared, range(work.first, layers), standard)
                says = work.model.finish(whole)
            tensors = {"settled": shared.settled, "last": shared.last, "says": says}
            partial = work.lesson(number).with_suffix(".partial")
            save_file({k: v.bfloat16().contiguous() for k, v in tensors.items()}, partial)
            partial.replace(work.lesson(number))
        progress.advance(task)
    return len(batches)


def distil(work: Distillation, lessons: int, progress: Progress) -> None:
    """Train the adapters, from where a checkpoint stands; a line a step goes to `log.jsonl`."""
    recipe = work.recipe
    modules = nn.ModuleDict({n.replace(".", "/"): a for n, a in work.adapters.items()})
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    total = recipe.epochs * lessons
    done = _resume(work, modules, optimizer)
    order = torch.randperm(lessons, generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    task = progress.add_task(f"retraining {recipe.name}", total=total, completed=done)
    for step in range(done, total):
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _factor(step, total, recipe.warmup_steps)
        optimizer.zero_grad()
        loss = _step(work, load_file(work.lesson(order[step % lessons])))
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        row = {"step": step + 1, "divergence": round(loss, 4)}
        row["seconds"] = round(time.monotonic() - started, 2)
        with (work.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        progress.update(task, advance=1, description=f"retraining {recipe.name}: {loss:.3f}")
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == total:
            _save(work, step + 1, modules, optimizer)


def _step(work: Distillation, lesson: Mapping[str, Tensor]) -> float:
    """Gradients of the mean divergence KL(standard || ladder) over a lesson's tokens; its value."""
    flow = StreamState(lesson["settled"].float(), lesson["last"].float())
    layers = range(work.first, work.model.config.layers)
    with torch.autocast("cpu", torch.bfloat16):
        says = work.model.finish(work.model.run(flow, layers, work.plans, work.adapters))
    total, gradient = divergence(says.detach(), lesson["says"], work.model.head)
    torch.autograd.backward(says, gradient)
    return total


def divergence(ladder: Tensor, standard: Tensor, head: Tensor) -> tuple[float, Tensor]:
    """Mean KL divergence of two models' predictions, given what their heads read [B, T, D], and
    its gradient to the first."""
    rows, wanted = ladder.flatten(0, -2), standard.flatten(0, -2)
    gradient, total = torch.empty_like(rows), 0.0
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK].detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            ours = F.linear(part, head)
            with torch.no_grad():
                theirs = F.linear(wanted[start : start + CHUNK], head)
        target = theirs.float().log_softmax(-1)
        loss = F.kl_div(
            ours.float().log_softmax(-1), target, reduction="sum", log_target=True
        ) / len(rows)
        torch.autograd.backward(loss)
        assert part.grad is not None
        gradient[start : start + CHUNK] = part.grad
        total += loss.item()
    return total, gradient.view(ladder.shape)


def _factor(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    phase = (step - warmup) / max(1, total - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * phase))


def _save(
    work: Distillation, steps: int, modules: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    partial = work.checkpoint.with_suffix(".partial")
    state = {"steps": steps, "model": modules.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, partial)
    partial.replace(work.checkpoint)


def _resume(work: Distillation, modules: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Steps already done according to the checkpoint, whose state is loaded."""
    if not work.checkpoint.exists():
        return 0
    state = torch.load(work.checkpoint, weights_only=True)
    modules.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["steps"])


def adapt(
    shapes: Mapping[str, Sequence[int]], layers: Sequence[int], rank: int, seed: int
) -> dict[str, LowRank]:
    """An adapter for every tensor of these layers, by the tensor's name."""
    random = torch.Generator().manual_seed(seed)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    chosen = sorted(name for name in shapes if name.startswith(prefixes))
    return {name: LowRank(shapes[name], rank, random) for name in chosen}


def delta_tensors(adapters: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """As a bundle's delta file holds them, in half precision."""
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"{name}.up"] = adapter.up.detach().half().contiguous()
        if adapter.down is not None:
            tensors[f"{name}.down"] = adapter.down.detach().half().contiguous()
    return tensors


class LadderRecipe(BaseModel):
    """Which layers read late, and how they are retrained to say what the standard model says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="of the new path")
    ladder_layers: int = Field(gt=0, description="the last so many layers become ladder layers")
    rank: int = Field(32, gt=0, description="of what is added to each matrix of these layers")
    tokens: int = Field(gt=0, description="of text that is trained on, in each epoch the same")
    window: int = Field(256, gt=1, description="tokens that are read together")
    batch_windows: int = Field(8, gt=0)
    epochs: int = Field(1, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(10, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    seed: int = 0
    held_out_tokens: int = Field(8192, gt=0, description="that qualities are measured on")
    held_out_window: int = Field(512, gt=1)
    untrained: tuple[int, ...] = Field(
        (), description="ladder layer counts to measure without training, for comparison"
    )

    @classmethod
    def load(cls, path: Path) -> LadderRecipe:
        """Raises `ConfigError` that names the field."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error
