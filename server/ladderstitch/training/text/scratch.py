"""Train small language models from scratch, one for each residual scheme.

All models start from the same weights and train on the same batches in the same order, so that the
results differ by the scheme only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.residual import LayerPlan, ResidualScheme, plan_layers
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.desync_pass import desync_logits
from ladderstitch.training.text.trainable_llama import TrainableLlama

END_TOKEN = "<end>"
SAVE_STEPS = 50


class ScratchRecipe(BaseModel):
    """The recipe of a comparison of residual schemes: sizes, schemes and schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: DecoderConfig
    schemes: dict[str, ResidualScheme] = Field(min_length=1, description="residual schemes by name")
    tokens: int = Field(gt=0, description="training tokens of each model; repeated text counts")
    window: int = Field(256, gt=1)
    batch_windows: int = Field(16, gt=0)
    learning_rate: float = Field(1.5e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    seed: int = 0
    held_out_tokens: int = Field(32_768, gt=0)
    measure_steps: int = Field(100, gt=0, description="steps between two held-out losses")

    @classmethod
    def load(cls, path: Path) -> ScratchRecipe:
        """Return the recipe in a YAML file; raises `ConfigError` that names the wrong field."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def steps(self) -> int:
        """Number of optimisation steps."""
        return self.tokens // (self.window * self.batch_windows)


def train_tokenizer(texts: Sequence[Path], size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of `size` tokens; token 0 ends an answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text) for text in texts], trainer)
    return tokenizer


def initial_weights(
    config: DecoderConfig, seed: int, *, shared_norm: bool = False
) -> dict[str, nn.Parameter]:
    """Return normally distributed weights of standard deviation 0.02; norms are 1.

    With `shared_norm`, attention and MLP of a layer share a norm (the parallel scheme). The
    deviation of a sub-block's last matrix is divided by sqrt(2 layers), like in GPT-2.
    """
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config, shared_norm=shared_norm).items():
        if len(shape) == 1:
            tensors[name] = nn.Parameter(torch.ones(shape))
            continue
        ends_sub_block = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(2 * config.layers) if ends_sub_block else 0.02
        tensors[name] = nn.Parameter(deviation * torch.randn(shape, generator=random))
    return tensors


@dataclass(slots=True)
class SchemeRun:
    """The training of one model: its tensors, residual plans and optimizer."""

    model: TrainableLlama
    residual: ResidualScheme
    plans: Sequence[LayerPlan]
    optimizer: torch.optim.Optimizer

    @classmethod
    def create(cls, recipe: ScratchRecipe, residual: ResidualScheme) -> SchemeRun:
        """Return a run with initial weights."""
        shared_norm = residual.scheme == "parallel"
        tensors = initial_weights(recipe.config, recipe.seed, shared_norm=shared_norm)
        matrices = [t for t in tensors.values() if t.dim() > 1]
        vectors = [t for t in tensors.values() if t.dim() == 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        plans = plan_layers(residual, recipe.config.layers, residual.ranks or 1)
        return cls(TrainableLlama(recipe.config, tensors), residual, plans, optimizer)

    def loss(self, batch: Tensor) -> Tensor:
        """Return the mean cross-entropy of the tokens [B, T + 1] after the first, in nats."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.logits(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, T, V] of tokens [B, T]."""
        if self.residual.scheme == "desync":
            return desync_logits(self.model, tokens, self.plans, self.residual.ranks or 1)
        return self.model.logits(tokens, self.plans)

    def train_step(self, batch: Tensor, learning_rate: float) -> float:
        """Take one optimisation step on tokens [B, T + 1]; return the loss before it, in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    @torch.inference_mode()
    def held_out_loss(self, windows: Tensor) -> float:
        """Return the mean loss over windows [W, T + 1], in nats per token."""
        losses = [self.loss(part).item() * len(part) for part in torch.split(windows, 16)]
        return sum(losses) / len(windows)

    def state(self) -> dict[str, object]:
        """Return the state for a checkpoint."""
        return {"tensors": dict(self.model.tensors), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Load the state of a checkpoint."""
        with torch.no_grad():
            for name, tensor in self.model.tensors.items():
                tensor.copy_(state["tensors"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def train_schemes(
    recipe: ScratchRecipe, text: Tensor, held_out: Tensor, folder: Path, progress: Progress
) -> dict[str, SchemeRun]:
    """Train a model of every scheme on windows [W, T + 1]; return the runs by scheme.

    Losses go to `log.jsonl`. Training continues from the folder's checkpoint if there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = {name: SchemeRun.create(recipe, r) for name, r in recipe.schemes.items()}
    checkpoint = folder / "checkpoint.pt"
    done = load_checkpoint(checkpoint, runs)
    task = progress.add_task("training", total=recipe.steps, completed=done)
    for step in range(done, recipe.steps):
        row = _train_step(recipe, runs, text, step)
        last = step + 1 == recipe.steps
        if last or (step + 1) % recipe.measure_steps == 0:
            for name, run in runs.items():
                row[f"{name}_held_out"] = round(run.held_out_loss(held_out), 4)
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        progress.update(task, advance=1, description=" ".join(f"{n} {row[n]}" for n in runs))
        if last or (step + 1) % SAVE_STEPS == 0:
            save_checkpoint(checkpoint, runs, step + 1)
    return runs


def _train_step(
    recipe: ScratchRecipe, runs: Mapping[str, SchemeRun], text: Tensor, step: int
) -> dict[str, object]:
    """Take one step with every run; return the losses and seconds for the log."""
    batch = select_batch(text, recipe.batch_windows, recipe.seed, step)
    rate = recipe.learning_rate * rate_factor(step, recipe.warmup_steps, recipe.steps)
    row: dict[str, object] = {"step": step + 1}
    for name, run in runs.items():
        started = time.monotonic()
        row[name] = round(run.train_step(batch, rate), 4)
        row[f"{name}_s"] = round(time.monotonic() - started, 2)
    return row


class Resumable(Protocol):
    """A training whose state a checkpoint holds."""

    def state(self) -> dict[str, object]:
        """Return the state for a checkpoint."""
        ...

    def restore(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Load the state of a checkpoint."""
        ...


def load_checkpoint(checkpoint: Path, runs: Mapping[str, Resumable]) -> int:
    """Restore the runs from the checkpoint, if there is one; return the number of steps done."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    for name, run in runs.items():
        run.restore(state[name])
    return int(state["steps"])


def save_checkpoint(checkpoint: Path, runs: Mapping[str, Resumable], steps: int) -> None:
    """Write the checkpoint; the previous one stays until the new one is complete."""
    partial = checkpoint.with_suffix(".partial")
    states = {name: run.state() for name, run in runs.items()}
    torch.save({"steps": steps} | states, partial)
    partial.replace(checkpoint)


def select_batch(text: Tensor, windows: int, seed: int, step: int) -> Tensor:
    """Return the windows of a step; the seed and the epoch determine the order of the windows."""
    epoch, index = divmod(step, len(text) // windows)
    random = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(text), generator=random)
    return text[order[index * windows : (index + 1) * windows]]


def rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Return the factor on the peak rate of a step: linear warm-up, then a cosine to 5 %."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    phase = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * phase))
