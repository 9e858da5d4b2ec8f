"""Trains small language models from scratch, one for each residual scheme, side by side.

All see the same batches in the same order from the same first weights, so that what differs in the
end is the scheme alone.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.residual import LayerPlan, ResidualScheme, plan_layers
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.trainable_llama import TrainableLlama

END = "<end>"
SAVE_STEPS = 50


class ScratchRecipe(BaseModel):
    """Sizes, schemes and schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: LlamaConfig
    schemes: dict[str, ResidualScheme] = Field(min_length=1, description="by name")
    tokens: int = Field(gt=0, description="that each model is trained on, repeated text included")
    window: int = Field(256, gt=1)
    batch_windows: int = Field(16, gt=0)
    learning_rate: float = Field(1.5e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    seed: int = 0
    held_out_tokens: int = Field(32_768, gt=0)
    measure_steps: int = Field(100, gt=0, description="between two looks at the held-out text")

    @classmethod
    def load(cls, path: Path) -> ScratchRecipe:
        """Raises `ConfigError` that names the field."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def steps(self) -> int:
        return self.tokens // (self.window * self.batch_windows)


def train_tokenizer(texts: Sequence[Path], size: int) -> Tokenizer:
    """Byte-level BPE of so many tokens, the first of which ends an answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text) for text in texts], trainer)
    return tokenizer


def first_weights(config: LlamaConfig, seed: int) -> dict[str, nn.Parameter]:
    """Normal, of deviation 0.02; what a residual sub-block ends with is smaller by sqrt(2 layers),
    as in GPT-2."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            tensors[name] = nn.Parameter(torch.ones(shape))
            continue
        deeper = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(2 * config.layers) if deeper else 0.02
        tensors[name] = nn.Parameter(deviation * torch.randn(shape, generator=random))
    return tensors


@dataclass(slots=True)
class SchemeRun:
    """One model in training."""

    model: TrainableLlama
    plans: Sequence[LayerPlan]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, recipe: ScratchRecipe, residual: ResidualScheme) -> SchemeRun:
        tensors = first_weights(recipe.config, recipe.seed)
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
        plans = plan_layers(residual, recipe.config.layers, 1)
        return cls(TrainableLlama(recipe.config, tensors), plans, optimizer)

    def loss(self, batch: Tensor) -> Tensor:
        """Mean surprise of the tokens [B, T + 1] after the first, in nats."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model.logits(batch[:, :-1], self.plans)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def learn(self, batch: Tensor, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    @torch.inference_mode()
    def held_out(self, windows: Tensor) -> float:
        losses = [self.loss(part).item() * len(part) for part in torch.split(windows, 16)]
        return sum(losses) / len(windows)

    def state(self) -> dict[str, object]:
        return {"tensors": dict(self.model.tensors), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        with torch.no_grad():
            for name, tensor in self.model.tensors.items():
                tensor.copy_(state["tensors"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def train_side_by_side(
    recipe: ScratchRecipe, text: Tensor, held_out: Tensor, folder: Path, progress: Progress
) -> dict[str, SchemeRun]:
    """Train every scheme on windows [W, T + 1]; `log.jsonl` gets the losses. Resumes."""
    folder.mkdir(parents=True, exist_ok=True)
    apprentices = {name: SchemeRun.of(recipe, r) for name, r in recipe.schemes.items()}
    checkpoint = folder / "checkpoint.pt"
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = int(state["steps"])
        for name, apprentice in apprentices.items():
            apprentice.restore(state[name])
    task = progress.add_task("training", total=recipe.steps, completed=done)
    for step in range(done, recipe.steps):
        batch = _batch(recipe, text, step)
        rate = _rate(recipe, step)
        row: dict[str, object] = {"step": step + 1}
        for name, apprentice in apprentices.items():
            started = time.monotonic()
            row[name] = round(apprentice.learn(batch, rate), 4)
            row[f"{name}_s"] = round(time.monotonic() - started, 2)
        last = step + 1 == recipe.steps
        if last or (step + 1) % recipe.measure_steps == 0:
            for name, apprentice in apprentices.items():
                row[f"{name}_held_out"] = round(apprentice.held_out(held_out), 4)
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        progress.update(task, advance=1, description=" ".join(f"{n} {row[n]}" for n in apprentices))
        if last or (step + 1) % SAVE_STEPS == 0:
            partial = checkpoint.with_suffix(".partial")
            states = {name: apprentice.state() for name, apprentice in apprentices.items()}
            torch.save({"steps": step + 1} | states, partial)
            partial.replace(checkpoint)
    return apprentices


def _batch(recipe: ScratchRecipe, text: Tensor, step: int) -> Tensor:
    """The same at every call: each epoch has an order of its own."""
    each = len(text) // recipe.batch_windows
    epoch, within = divmod(step, each)
    random = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    order = torch.randperm(len(text), generator=random)
    return text[order[within * recipe.batch_windows : (within + 1) * recipe.batch_windows]]


def _rate(recipe: ScratchRecipe, step: int) -> float:
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    phase = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * phase)))
