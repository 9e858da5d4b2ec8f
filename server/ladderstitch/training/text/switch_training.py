"""Switch-aware training: windows whose tokens take different paths, with translated KV.

The loss of a step is the cross-entropy of the text, plus the divergence from the predictions that
the largest anchor makes alone, plus the error of translated keys and values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from ladderstitch.text.model.family import DecoderFamily
from ladderstitch.text.model.family_weights import STITCHES
from ladderstitch.training.text.elastic_recipe import StitchSchedule
from ladderstitch.training.text.family_routes import Route, Span, all_routes
from ladderstitch.training.text.scratch import (
    SAVE_STEPS,
    load_checkpoint,
    rate_factor,
    save_checkpoint,
    select_batch,
)
from ladderstitch.training.text.stitching_maps import run_anchor, translation_error
from ladderstitch.training.text.trainable_family import TrainableFamily
from ladderstitch.training.text.trainable_llama import StreamState

CHECKPOINT_NAME = "family"
Measure = Callable[[TrainableFamily], dict[str, float]]


@dataclass(slots=True)
class FamilyRun:
    """The training of a family: its tensors, schedule and optimizer."""

    family: TrainableFamily
    schedule: StitchSchedule
    optimizer: torch.optim.Optimizer

    @classmethod
    def create(cls, family: TrainableFamily, schedule: StitchSchedule) -> FamilyRun:
        """Return a run over the family's tensors; those that are trained get gradients."""
        maps: list[Tensor] = []
        matrices: list[Tensor] = []
        vectors: list[Tensor] = []
        for name, tensor in family.tensors.items():
            is_map = name.startswith(STITCHES)
            is_largest = name.startswith(("model.", "lm_head."))
            if not is_map and not schedule.trains_anchors:
                continue
            if is_largest and not schedule.train_largest:
                continue
            tensor.requires_grad_()
            (maps if is_map else matrices if tensor.dim() > 1 else vectors).append(tensor)
        rate = schedule.learning_rate
        slow = rate * schedule.anchor_learning_rate_factor
        groups: list[dict[str, object]] = [
            {"params": maps, "peak_rate": rate, "weight_decay": 0.0},
            {"params": matrices, "peak_rate": slow, "weight_decay": schedule.weight_decay},
            {"params": vectors, "peak_rate": slow, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
        return cls(family, schedule, optimizer)

    def losses(self, batch: Tensor, spans: Sequence[Span]) -> dict[str, Tensor]:
        """Return the parts of the loss for tokens [B, T + 1], in nats or relative."""
        family, tokens, targets = self.family, batch[:, :-1], batch[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                streams, hidden = run_anchor(family, family.largest, tokens)
                expected = F.linear(hidden, family.models[-1].head)
            parts = family.final_hidden(tokens, spans)
            logits = {
                anchor: F.linear(hidden, family.models[anchor].head)
                for anchor, (_, hidden) in parts.items()
            }
        text, divergence = torch.zeros(()), torch.zeros(())
        for anchor, (positions, _) in parts.items():
            found = logits[anchor].float().log_softmax(-1).flatten(0, 1)
            text = text + F.nll_loss(found, targets[:, positions].flatten(), reduction="sum")
            target = expected[:, positions].float().log_softmax(-1).flatten(0, 1)
            divergence = divergence + F.kl_div(found, target, reduction="sum", log_target=True)
        losses = {"text": text / targets.numel(), "divergence": divergence / targets.numel()}
        if self.schedule.translation:
            losses["translation"] = self._translation(tokens, streams)
        return losses

    def _translation(self, tokens: Tensor, largest: list[StreamState]) -> Tensor:
        """Return the error of translated keys and values between anchors that run alone."""
        family = self.family
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                smaller = [run_anchor(family, a, tokens)[0] for a in range(family.largest)]
            return translation_error(family, [*smaller, largest])

    def train_step(self, batch: Tensor, spans: Sequence[Span], factor: float) -> dict[str, float]:
        """Take one step on tokens [B, T + 1]; return the parts of the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_rate"] * factor
        self.optimizer.zero_grad()
        losses = self.losses(batch, spans)
        weights = {"text": 1.0, "divergence": self.schedule.distillation}
        weights["translation"] = self.schedule.translation
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        torch.autograd.backward(total)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        return {name: round(loss.item(), 4) for name, loss in losses.items()}

    def state(self) -> dict[str, object]:
        """Return the state for a checkpoint."""
        tensors = {name: tensor.detach() for name, tensor in self.family.tensors.items()}
        return {"tensors": tensors, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Load the state of a checkpoint."""
        with torch.no_grad():
            for name, tensor in self.family.tensors.items():
                tensor.copy_(state["tensors"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def train_family(
    family: TrainableFamily,
    schedule: StitchSchedule,
    seed: int,
    text: Tensor,
    folder: Path,
    measure: Measure,
    progress: Progress,
) -> None:
    """Train the family in place on windows [W, T + 1]; lines go to `log.jsonl` in the folder.

    `measure` gives figures for the log. Training continues from the folder's checkpoint if there
    is one.
    """
    checkpoint = folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    run = FamilyRun.create(family, schedule)
    done = load_checkpoint(checkpoint, {CHECKPOINT_NAME: run})
    task = progress.add_task("training paths", total=schedule.steps, completed=done)
    for step in range(done, schedule.steps):
        started = time.monotonic()
        batch = select_batch(text, schedule.batch_windows, seed, step)
        random = torch.Generator().manual_seed(seed * 100_003 + step)
        spans = draw_spans(schedule, family.decoders, random)
        factor = rate_factor(step, schedule.warmup_steps, schedule.steps)
        row: dict[str, float] = {"step": step + 1}
        row |= run.train_step(batch, spans, factor)
        row["seconds"] = round(time.monotonic() - started, 2)
        last = step + 1 == schedule.steps
        if last or (step + 1) % schedule.measure_steps == 0:
            row |= measure(family)
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        progress.update(task, advance=1, description=f"training paths: {row['text']}")
        if last or (step + 1) % SAVE_STEPS == 0:
            save_checkpoint(checkpoint, {CHECKPOINT_NAME: run}, step + 1)


def draw_spans(
    schedule: StitchSchedule, family: DecoderFamily, random: torch.Generator
) -> list[Span]:
    """Return random paths for a window: one change of path, or one path for each segment.

    If anchors are not trained, the paths need stitching maps.
    """
    while True:
        spans = _draw_spans(schedule, family, random)
        needs_maps = spans[0].route.is_stitched or len({span.route for span in spans}) > 1
        if needs_maps or schedule.trains_anchors:
            return spans


def _draw_spans(
    schedule: StitchSchedule, family: DecoderFamily, random: torch.Generator
) -> list[Span]:
    routes = all_routes(family)
    segments = schedule.window // schedule.segment
    lengths = [schedule.segment] * segments
    if segments > 1 and _uniform(random) < schedule.switch_share:
        cut = int(torch.randint(1, segments, (), generator=random)) * schedule.segment
        lengths = [cut, schedule.window - cut]
    return [Span(_draw_route(schedule, routes, random), length) for length in lengths]


def _draw_route(
    schedule: StitchSchedule, routes: Sequence[Route], random: torch.Generator
) -> Route:
    """Return a random path: an anchor with the recipe's share, else a stitched path."""
    is_stitched = _uniform(random) >= schedule.anchor_share
    chosen = [route for route in routes if route.is_stitched == is_stitched]
    return chosen[int(torch.randint(len(chosen), (), generator=random))]


def _uniform(random: torch.Generator) -> float:
    return float(torch.rand((), generator=random))
