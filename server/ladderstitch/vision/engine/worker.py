"""A worker process (one rank): holds the weights and runs one batch after another.

Started by `engine.process` as `python -m ladderstitch.vision.engine.worker SOCKET MEMORY CONFIG`;
it ends when the socket closes, so it never outlives its replica.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

import torch

from ladderstitch.runtime.device import DTYPES
from ladderstitch.runtime.process import settle_for_good
from ladderstitch.vision.bundle import Bundle
from ladderstitch.vision.engine.base import COMMAND, READY, REPLY, Buffers, WorkerConfig
from ladderstitch.vision.models.executor import StitchExecutor


class Worker:
    """The model on its device, between shared input and output buffers."""

    def __init__(self, config: WorkerConfig, buffers: Buffers) -> None:
        torch.set_num_threads(config.threads)
        self.device = torch.device(config.device)
        model = Bundle.load(Path(config.bundle)).load_model(DTYPES[config.dtype])
        self.model = StitchExecutor(model.to(self.device))
        self.images = torch.from_numpy(buffers.images)
        self.logits = torch.from_numpy(buffers.logits)

    def run(self, batch_size: int, stitch: int) -> int:
        """Answer the first `batch_size` images; nanoseconds of compute."""
        started = time.perf_counter_ns()
        with torch.inference_mode():
            logits = self.model(self.images[:batch_size].to(self.device, non_blocking=True), stitch)
            self.logits[:batch_size].copy_(logits)  # waits for the device
        return time.perf_counter_ns() - started


def serve(commands: socket.socket, worker: Worker) -> None:
    """Answer commands until the other end closes; an error ends its batch, not the worker."""
    settle_for_good()
    commands.send(READY)
    while message := commands.recv(COMMAND.size):
        try:
            reply = REPLY.pack(0, worker.run(*COMMAND.unpack(message)))
        except Exception as error:
            reply = REPLY.pack(1, 0) + f"{type(error).__name__}: {error}".encode()[:4096]
        commands.send(reply)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the replica drains, then closes us
    descriptor, memory, config = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with socket.socket(fileno=descriptor) as commands:
        parsed = WorkerConfig.from_json(config)
        serve(commands, Worker(parsed, Buffers.map(parsed, memory)))


if __name__ == "__main__":
    main()
