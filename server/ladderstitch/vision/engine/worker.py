"""The worker process: holds the weights and runs one batch after another.

`ProcessEngine` starts it as `python -m ladderstitch.vision.engine.worker SOCKET MEMORY CONFIG`. The
process ends when the socket closes, so it never outlives its replica.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ladderstitch.runtime.cuda_graphs import CudaGraphs
from ladderstitch.runtime.device import DTYPES, use_device
from ladderstitch.runtime.process import freeze_gc
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.base import (
    BEAT,
    BEAT_S,
    COMMAND,
    READY,
    REPLY,
    Buffers,
    EngineConfig,
)
from ladderstitch.vision.engine.cuda_graphs import GraphedExecutor
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.nested.model import NestedModel
from ladderstitch.vision.models.stitched import StitchedModel


class Worker:
    """The model on its device, between shared input and output buffers."""

    def __init__(self, config: EngineConfig, buffers: Buffers) -> None:
        torch.set_num_threads(config.threads)
        model = VisionBundle.load(Path(config.bundle)).load_model(DTYPES[config.dtype])
        self.execute = make_executor(model, config)
        self.images = torch.from_numpy(buffers.images)
        self.logits = torch.from_numpy(buffers.logits)

    def run(self, batch_size: int, stitch: int) -> int:
        """Compute the logits of the first `batch_size` images; return nanoseconds of compute."""
        started = time.perf_counter_ns()
        with torch.inference_mode():
            logits = self.execute(self.images[:batch_size], stitch)
            self.logits[:batch_size].copy_(logits)  # synchronises with the device
        return time.perf_counter_ns() - started


def make_executor(
    model: StitchedModel | NestedModel, config: EngineConfig
) -> Callable[[Tensor, int], Tensor]:
    """Return the function from images [B, C, H, W] on the CPU and a stitch to logits [B, K].

    On CUDA it replays captured graphs, elsewhere it runs eagerly.
    """
    device = use_device(config.device)
    executor = StitchExecutor(model.to(device))
    if device.type == "cuda":
        input_shape = (config.max_batch_size, *config.image_shape)
        return GraphedExecutor(executor, CudaGraphs(), input_shape, device)
    return lambda images, stitch: executor(images.to(device), stitch)


def send_beats(commands: socket.socket) -> None:
    """Report every `BEAT_S` seconds that this process runs, until the socket closes."""
    with contextlib.suppress(OSError):
        while True:
            time.sleep(BEAT_S)
            commands.send(BEAT)


def serve(commands: socket.socket, worker: Worker) -> None:
    """Run the commands of the socket until it closes; an error fails its batch, not the worker."""
    freeze_gc()
    threading.Thread(target=send_beats, args=(commands,), name="beats", daemon=True).start()
    commands.send(READY)
    while message := commands.recv(COMMAND.size):
        batch, batch_size, stitch = COMMAND.unpack(message)
        try:
            reply = REPLY.pack(batch, 0, worker.run(batch_size, stitch))
        except Exception as error:
            reply = REPLY.pack(batch, 1, 0) + f"{type(error).__name__}: {error}".encode()[:4096]
        commands.send(reply)


def main() -> None:
    """Load the model that the command line names, and serve its socket."""
    # On Ctrl-C the replica drains first, then closes the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, memory, config = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with socket.socket(fileno=descriptor) as commands:
        parsed = EngineConfig.from_json(config)
        serve(commands, Worker(parsed, Buffers.map(parsed, memory)))


if __name__ == "__main__":
    main()
