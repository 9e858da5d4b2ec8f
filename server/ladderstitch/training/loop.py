"""The optimisation loop that anchors and stitched families share: seeded, resumable, logged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ladderstitch.training.data import LabelledImages, augment
from ladderstitch.training.recipe import DataSet, Schedule

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(images [B, C, H, W], labels [B], random source) -> scalar loss."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one optimisation run needs besides its model: names, files and data."""

    name: str
    folder: Path
    seed: int
    schedule: Schedule
    data: DataSet
    images: LabelledImages

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log.jsonl"


def normalise(pixels: Tensor, data: DataSet) -> Tensor:
    """uint8 [B, C, H, W] -> float32 (pixel / 255 - mean) / std per channel."""
    mean = torch.tensor(data.mean).view(1, -1, 1, 1)
    std = torch.tensor(data.std).view(1, -1, 1, 1)
    return (pixels.float() / 255 - mean) / std


def fit(
    model: nn.Module,
    groups: list[dict[str, object]],
    loss: Loss,
    validate: Callable[[], dict[str, float]],
    run: Run,
    progress: Progress,
) -> None:
    """Train `model` in place for the schedule's epochs, resuming where a checkpoint stands.

    Everything random in epoch e comes from one generator seeded by (seed, e), so a resumed run
    ends bit for bit where an uninterrupted one does.
    """
    schedule = run.schedule
    steps = len(run.images) // schedule.batch_size
    optimizer = torch.optim.AdamW(
        groups, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(schedule, steps))
    done = _resume(run, model, optimizer, scheduler)
    task = progress.add_task(run.name, total=schedule.epochs * steps, completed=done * steps)
    for epoch in range(done, schedule.epochs):
        started = time.monotonic()
        rng = torch.Generator().manual_seed(run.seed * 100_003 + epoch)
        total = 0.0
        model.train()
        for chosen in torch.randperm(len(run.images), generator=rng)[: steps * schedule.batch_size].split(
            schedule.batch_size
        ):
            images = augment(
                normalise(run.images.pixels[chosen], run.data),
                rng,
                shift=run.data.augmentation.shift_pixels,
                erase=run.data.augmentation.erase_pixels,
            )
            # The CPU flash kernel's backward takes over half of a step at 17 tokens: math it is.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                value = loss(images, run.images.labels[chosen], rng)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += float(value.detach())
            progress.advance(task)
        model.eval()
        row = {"run": run.name, "epoch": epoch + 1, "loss": round(total / steps, 4)}
        row |= {key: round(number, 4) for key, number in validate().items()}
        row["seconds"] = round(time.monotonic() - started, 1)
        with run.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
        progress.console.print(row)
        _save(run, epoch + 1, model, optimizer, scheduler)


def accuracy(answer: Callable[[Tensor], Tensor], images: LabelledImages, data: DataSet) -> float:
    """Top-1 of `answer`, which maps [B, C, H, W] to logits."""
    with torch.inference_mode():
        right = sum(
            int((answer(normalise(pixels, data)).argmax(1) == labels).sum())
            for pixels, labels in zip(
                images.pixels.split(500), images.labels.split(500), strict=True
            )
        )
    return right / len(images)


def _warmup_cosine(schedule: Schedule, steps: int) -> Callable[[int], float]:
    warmup = max(1, round(schedule.warmup_epochs * steps))
    total = schedule.epochs * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        phase = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * phase))

    return factor


def _save(
    run: Run,
    epochs_done: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> None:
    state = {
        "epochs_done": epochs_done,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": scheduler.last_epoch},
    }
    partial = run.checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(run.checkpoint)


def _resume(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> int:
    """Epochs already done according to the run's checkpoint, whose state is loaded."""
    if not run.checkpoint.exists():
        return 0
    state = torch.load(run.checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.last_epoch = state["scheduler"]["last_epoch"]
    return int(state["epochs_done"])
