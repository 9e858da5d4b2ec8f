"""The optimisation loop that anchors and stitched families share: seeded, resumable, logged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ladderstitch.training.vision.dataset import LabelledImages, augment, normalise
from ladderstitch.training.vision.recipe import DataSet, Schedule
from ladderstitch.vision.models.cost import stitch_cost
from ladderstitch.vision.models.stitched import StitchedModel

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(images [B, C, H, W], labels [B], random source) -> scalar loss."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """What one optimisation run needs besides its model: names, files and data."""

    name: str
    folder: Path
    seed: int
    schedule: Schedule
    data: DataSet
    images: LabelledImages
    bfloat16: bool = True

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log.jsonl"


def fit(
    model: nn.Module,
    groups: list[dict[str, object]],
    loss: Loss,
    validate: Callable[[], dict[str, float]],
    run: TrainingRun,
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
        total = 0.0
        model.train()
        for images, labels, rng in _batches(run, epoch, steps):
            # The CPU flash kernel's backward takes over half of a step at 17 tokens: math it is.
            with autocast(run.bfloat16), sdpa_kernel(SDPBackend.MATH):
                value = loss(images, labels, rng)
            optimizer.zero_grad()
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += float(value.detach())
            progress.advance(task)
        model.eval()
        row: dict[str, object] = {"run": run.name, "epoch": epoch + 1}
        row["loss"] = round(total / steps, 4)
        row |= {key: round(number, 4) for key, number in validate().items()}
        row["seconds"] = round(time.monotonic() - started, 1)
        with run.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
        progress.console.print(row)
        _save(run, epoch + 1, model, optimizer, scheduler)


def _batches(
    run: TrainingRun, epoch: int, steps: int
) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
    """Augmented images, labels and the epoch's random source, for each step of an epoch."""
    rng = torch.Generator().manual_seed(run.seed * 100_003 + epoch)
    order = torch.randperm(len(run.images), generator=rng)
    size, data = run.schedule.batch_size, run.data
    for step in range(steps):
        chosen = order[step * size : (step + 1) * size]
        images = augment(
            normalise(run.images.pixels[chosen], data.mean, data.std),
            rng,
            shift=data.augmentation.shift_pixels,
            erase=data.augmentation.erase_pixels,
        )
        yield images, run.images.labels[chosen], rng


def accuracy(answer: Callable[[Tensor], Tensor], images: LabelledImages, data: DataSet) -> float:
    """Top-1 of `answer`, which maps [B, C, H, W] to logits."""
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), 500):
            pixels = normalise(images.pixels[start : start + 500], data.mean, data.std)
            right += int((answer(pixels).argmax(1) == images.labels[start : start + 500]).sum())
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
    run: TrainingRun,
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


def autocast(bfloat16: bool) -> torch.autocast:
    """A choice, since oneDNN's bfloat16 convolutions give infinite gradients on 1 x 1 maps."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)


def _resume(
    run: TrainingRun,
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


def groups_by_cost(macs: dict[int, int], step: float) -> list[list[int]]:
    """Ids in order of cost; a new group opens when one costs `step` more than its first.

    Resource-constrained sampling (SN-Netv2, arXiv 2307.00154, section 3.3): cheap and dear networks
    come up as often as the many in between.
    """
    groups: list[list[int]] = []
    first = -float("inf")
    for stitch in sorted(macs, key=lambda stitch: (macs[stitch], stitch)):
        if macs[stitch] > first + step:
            groups.append([])
            first = macs[stitch]
        groups[-1].append(stitch)
    return groups


def sampling_groups(model: StitchedModel, image_size: int, step: float | None) -> list[list[int]]:
    """Usable ids in groups that are drawn alike: all of them, or by cost."""
    usable = [stitch for stitch in model.stitches if stitch.usable]
    if step is None:
        return [[stitch.id for stitch in usable]]
    macs = {stitch.id: stitch_cost(model, stitch, image_size).macs for stitch in usable}
    return groups_by_cost(macs, step)


def draw(groups: Sequence[Sequence[int]], rng: torch.Generator) -> int:
    """A group, then an id in it, both uniformly."""
    group = groups[int(torch.randint(len(groups), (), generator=rng))]
    return group[int(torch.randint(len(group), (), generator=rng))]
