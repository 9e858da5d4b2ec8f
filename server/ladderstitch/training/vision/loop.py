"""The training loop of anchors and stitched families: seeded, resumable, logged."""

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
from torch.nn.modules.batchnorm import _BatchNorm

from ladderstitch.training.vision.dataset import LabelledImages, augment, normalise
from ladderstitch.training.vision.recipe import Augmentation, Schedule
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.models.cost import stitch_cost
from ladderstitch.vision.models.stitched import StitchedModel

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Function (images [B, C, H, W], labels [B], random source) -> scalar loss."""


SMALL_SIDE = 32
"""Side of images in pixels up to which every layout of convolutions is safe."""
CHANNEL_BLOCK = 16
"""Channels that convolutions handle together on CPUs."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The name, files, schedule and data of one training run."""

    name: str
    folder: Path
    seed: int
    schedule: Schedule
    inputs: Preprocessing
    augmentation: Augmentation
    images: LabelledImages
    bfloat16: bool = True
    frozen_batch_norm: bool = False

    @property
    def checkpoint(self) -> Path:
        """File with the state after the last finished epoch."""
        return self.folder / f"{self.name}.checkpoint.pt"

    @property
    def log(self) -> Path:
        """File with one JSON line per epoch."""
        return self.folder / f"{self.name}.log.jsonl"


def fit(
    model: nn.Module,
    groups: list[dict[str, object]],
    loss: Loss,
    validate: Callable[[], dict[str, float]],
    run: TrainingRun,
    progress: Progress,
) -> None:
    """Train `model` in place for the schedule's epochs, from the run's checkpoint if there is one.

    All random numbers of epoch e come from one generator seeded by (seed, e), so that a resumed run
    ends with the same bits as an uninterrupted one.
    """
    schedule = run.schedule
    size = min(schedule.batch_size, len(run.images))
    steps = len(run.images) // size
    model.to(memory_format=_choose_layout(model, run.images))  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        groups, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(schedule, steps))
    done = _load_checkpoint(run, model, optimizer, scheduler)
    task = progress.add_task(run.name, total=schedule.epochs * steps, completed=done * steps)
    for epoch in range(done, schedule.epochs):
        started, started_cpu = time.monotonic(), time.process_time()
        total = 0.0
        model.train()
        if run.frozen_batch_norm:
            _freeze_batch_norm(model)
        for images, labels, rng in _iterate_batches(run, epoch, size):
            # With 17 tokens, the backward pass of the CPU flash kernel takes over half of a step;
            # the math kernel is faster.
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
        row["cpu_seconds"] = round(time.process_time() - started_cpu, 1)
        with run.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
        progress.console.print(row)
        _save_checkpoint(run, epoch + 1, model, optimizer, scheduler)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def read_cpu_seconds(folder: Path) -> float | None:
    """Return the CPU time of a run's epochs, of all threads and networks, validation included.

    None if there are no logs, or if older ones do not state it.
    """
    lines = [line for log in folder.glob("*.log.jsonl") for line in log.read_text().splitlines()]
    spent = [json.loads(line).get("cpu_seconds") for line in lines]
    return round(sum(spent), 1) if spent and None not in spent else None


def _choose_layout(model: nn.Module, images: LabelledImages) -> torch.memory_format:
    """Return channels-last where it is safe: convolutions need 15 to 25 % less time in it.

    With torch 2.13 their backward pass in this layout writes outside its memory on CPUs, for maps
    of 64 x 64 and more if the channels are not multiples of 16.
    """
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    small = max(images.pixels.shape[2:]) <= SMALL_SIDE
    aligned = all(width % CHANNEL_BLOCK == 0 for width in widths)
    return torch.channels_last if small or aligned else torch.contiguous_format


def _freeze_batch_norm(model: nn.Module) -> None:
    """Let batch normalisation use its running statistics, and leave them as they are."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _iterate_batches(
    run: TrainingRun, epoch: int, size: int
) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
    """Yield augmented images, labels and the epoch's random source for each batch of an epoch."""
    rng = torch.Generator().manual_seed(run.seed * 100_003 + epoch)
    order = torch.randperm(len(run.images), generator=rng)
    for step in range(len(run.images) // size):
        chosen = order[step * size : (step + 1) * size]
        images = augment(
            normalise(run.images.pixels[chosen], run.inputs.mean, run.inputs.std),
            rng,
            shift=run.augmentation.shift_pixels,
            erase=run.augmentation.erase_pixels,
        )
        yield images, run.images.labels[chosen], rng


def accuracy(
    model: Callable[[Tensor], Tensor], images: LabelledImages, inputs: Preprocessing
) -> float:
    """Return the top-1 accuracy of `model`, a function from [B, C, H, W] to logits."""
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(images), 500):
            pixels = normalise(images.pixels[start : start + 500], inputs.mean, inputs.std)
            correct += int((model(pixels).argmax(1) == images.labels[start : start + 500]).sum())
    return correct / len(images)


def _warmup_cosine(schedule: Schedule, steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step."""
    warmup = max(1, round(schedule.warmup_epochs * steps))
    total = schedule.epochs * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        phase = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * phase))

    return factor


def _save_checkpoint(
    run: TrainingRun,
    epochs_done: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> None:
    """Write the run's checkpoint; the previous one stays until the new one is complete."""
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
    """Return the autocast context of a training step; it does nothing unless `bfloat16` is set.

    bfloat16 is optional because oneDNN's convolutions give infinite gradients on 1 x 1 maps.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)


def _load_checkpoint(
    run: TrainingRun,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> int:
    """Load the run's checkpoint, if there is one; return the number of finished epochs."""
    if not run.checkpoint.exists():
        return 0
    state = torch.load(run.checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.last_epoch = state["scheduler"]["last_epoch"]
    return int(state["epochs_done"])


def groups_by_cost(macs: dict[int, int], step: float) -> list[list[int]]:
    """Return the ids in order of cost, in groups that each span at most `step` MACs.

    This is resource-constrained sampling (SN-Netv2, arXiv 2307.00154, section 3.3): the few cheap
    and the few expensive networks are drawn as often as the many in between.
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
    """Return the usable ids in groups of equal probability: one group, or groups by cost.

    `step` is the span of a group in MACs; without it there is one group.
    """
    usable = [stitch for stitch in model.stitches if stitch.usable]
    if step is None:
        return [[stitch.id for stitch in usable]]
    macs = {stitch.id: stitch_cost(model, stitch, image_size).macs for stitch in usable}
    return groups_by_cost(macs, step)


def groups_by_pair(model: StitchedModel) -> list[list[int]]:
    """Return, per set of anchors that are stitched to each other, these anchors and stitches.

    The paths with groups of an anchor belong to it. An anchor that has such paths and is not
    stitched is a set of its own.
    """
    usable = [stitch for stitch in model.stitches if stitch.usable]
    sets = {frozenset(segment.anchor for segment in stitch.segments) for stitch in usable}
    joined = {anchor for anchors in sets if len(anchors) > 1 for anchor in anchors}
    grouped = {stitch.front for stitch in usable if stitch.segments[0].groups} - joined
    pairs = sorted(sorted(anchors) for anchors in sets if len(anchors) > 1 or anchors <= grouped)
    return [
        [s.id for s in usable if {segment.anchor for segment in s.segments} <= set(pair)]
        for pair in pairs
    ]


def draw_stitch(groups: Sequence[Sequence[int]], rng: torch.Generator) -> int:
    """Return an id: a group is drawn uniformly, then an id of that group."""
    group = groups[int(torch.randint(len(groups), (), generator=rng))]
    return group[int(torch.randint(len(group), (), generator=rng))]
