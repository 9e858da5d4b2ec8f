"""A rank: one process that holds one share of a language model and does as its group says.

Started as `python -m ladderstitch.text.engine.rank ADDRESS`, with the group's secret in the
environment, on the group's machine or another. It ends when the group's socket closes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ladderstitch.text.comm.base import (
    CommSpec,
    Communicator,
    NcclSpec,
    PeerLost,
    SharedMemorySpec,
    SingleRank,
    SingleSpec,
    SymmetricSpec,
    TcpSpec,
)
from ladderstitch.text.engine import wire
from ladderstitch.text.engine.rank_config import Assignment, CommInit, RankConfig
from ladderstitch.text.engine.wire import Kind, Message
from ladderstitch.text.model.attention_batch import Batch
from ladderstitch.text.model.kv_cache import PagedCache
from ladderstitch.text.model.llama import Transformer
from ladderstitch.text.model.residual import LayerPlan, plan_layers
from ladderstitch.text.model.weight_reader import DeltaWeights, load_delta, touched_layers
from ladderstitch.text.model.weights import Shard, load_layer, load_rank
from ladderstitch.text.step import Step

log = logging.getLogger(__name__)

SECRET_VARIABLE = "LADDERSTITCH_RANK_SECRET"


class Rank:
    """The model's share and its cache; `join` may be called again when the group is re-made."""

    def __init__(self, assignment: Assignment) -> None:
        job = assignment.job
        torch.set_num_threads(job.threads)
        started, anonymous = time.monotonic(), anonymous_bytes()
        self.job = job
        self.shard = Shard.of(job.config, assignment.rank, job.ranks)
        self.models = load_models(job, self.shard)
        self.cache = PagedCache(
            job.config, self.shard, job.blocks, job.block_tokens, job.torch_dtype, job.device
        )
        self.link: Communicator | None = None
        self.paths: list[tuple[tuple[LayerPlan, ...], Communicator]] = []
        self.loaded = {
            "weight_bytes": self.models[0].weights.bytes(),
            "cache_bytes": self.cache.bytes,
            "memory_bytes": anonymous_bytes() - anonymous,
            "seconds": time.monotonic() - started,
        }

    def join(self, spec: CommSpec, listener: socket.socket) -> None:
        """Reach the peers by a new link, and let go of the old one."""
        if self.link is not None:
            self.link.close()
        link = create_communicator(spec, self.job, self.shard, listener)
        silent = SingleRank(self.shard.rank, self.shard.ranks)
        self.link = link
        self.paths = [
            (
                plan_layers(residual, self.job.config.layers, self.job.ranks),
                silent if residual.scheme == "no_communication" else link,
            )
            for residual in self.job.paths
        ]

    def forward(self, message: Message) -> Message:
        """A step -> of this rank's vocabulary the best tokens, and the logits that are wanted."""
        step = Step.unpack(message.header, message.body)
        batch = Batch(step, self.job.block_tokens, self.job.device)
        plans, link = self.paths[step.path]
        logits = self.models[step.path].forward(batch, self.cache, plans, link).float()
        best = logits[batch.best_rows].max(dim=-1) if batch.best_rows else None
        full = np.ascontiguousarray(logits[batch.full_rows].cpu().numpy())
        header = {
            "best": best.values.tolist() if best else [],
            "tokens": (best.indices + self.shard.vocabulary.start).tolist() if best else [],
            "shape": full.shape,
        }
        return Message(Kind.LOGITS, header, full.data.cast("B") if full.size else b"")


def load_models(job: RankConfig, shard: Shard) -> list[Transformer]:
    """One rank's share of every path; paths share all tensors that no delta changes."""
    read = job.weights()
    share = load_rank(
        read, job.config, shard, job.torch_dtype, job.device, shared_norm=job.shared_norm
    )
    plain = Transformer(job.config, share, shard)
    models = []
    for file in job.deltas or (None,) * len(job.paths):
        if file is None:
            models.append(plain)
            continue
        delta = load_delta(file)
        layers = list(share.layers)
        for layer in touched_layers(delta):
            layers[layer] = load_layer(
                DeltaWeights(read, delta),
                layer,
                job.config,
                shard,
                job.torch_dtype,
                job.device,
                shared_norm=job.shared_norm,
            )
        models.append(Transformer(job.config, replace(share, layers=tuple(layers)), shard))
    return models


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def create_communicator(
    spec: CommSpec, job: RankConfig, shard: Shard, listener: socket.socket
) -> Communicator:
    """This rank's end of the link that a group asks for."""
    match spec:
        case SharedMemorySpec():
            from ladderstitch.text.comm.shared_memory import LinkModel, SharedMemoryCommunicator

            model = LinkModel(spec.latency_s, spec.bytes_per_s or float("inf"))
            return SharedMemoryCommunicator(
                spec.path, shard.rank, shard.ranks, spec.slot_bytes, model
            )
        case TcpSpec():
            from ladderstitch.text.comm.tcp import TcpCommunicator

            return TcpCommunicator(listener, shard.rank, spec.addresses, spec.secret.encode())
        case NcclSpec():
            from ladderstitch.text.comm.nccl import NcclCommunicator

            if shard.rank == 0:
                listener.close()  # NCCL's store listens there
            return NcclCommunicator(spec.store, shard.rank, shard.ranks)
        case SymmetricSpec():
            from ladderstitch.text.comm.symmetric import SymmetricCommunicator, reach_peers

            if shard.rank == 0:
                listener.close()
            device = torch.device(job.device)
            memory = reach_peers(spec.path, spec.store, shard.rank, shard.ranks, device)
            return SymmetricCommunicator(
                memory,
                spec.path,
                job.max_batched_tokens,
                job.config.hidden_size,
                job.torch_dtype,
                device,
            )
        case SingleSpec():
            return SingleRank()


def serve(group: socket.socket, listener: socket.socket) -> None:
    """Answer the group's messages until it closes the socket; errors are answers, not ends."""
    rank: Rank | None = None
    while True:
        try:
            message = wire.receive(group)
        except (EOFError, OSError):
            return
        try:
            if message.kind == Kind.ASSIGN:
                rank = Rank(Assignment.model_validate(message.header))
                reply = Message(Kind.LOADED, rank.loaded)
            elif rank is None:
                reply = Message(Kind.FAILED, {"error": "this rank has no model yet"})
            elif message.kind == Kind.JOIN:
                rank.join(CommInit.model_validate(message.header).link, listener)
                reply = Message(Kind.JOINED)
            else:
                reply = rank.forward(message)
        except Exception as error:
            log.warning("rank failed: %s: %s", type(error).__name__, error)
            failure = {
                "error": f"{type(error).__name__}: {error}"[:4096],
                "peer_lost": isinstance(error, PeerLost),
            }
            reply = Message(Kind.FAILED, failure)
        try:
            wire.send(group, reply)
        except OSError:
            return


def connect(address: str) -> socket.socket:
    """The group's socket: `unix:PATH` or `HOST:PORT`."""
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix("unix:"))
        return connection
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def run(address: str, secret: str) -> None:
    """Be a rank of the group at that address until it lets go."""
    with connect(address) as group, socket.socket() as listener:
        own_address = group.getsockname()[0] if group.family != socket.AF_UNIX else "127.0.0.1"
        listener.bind((own_address, 0))
        listener.listen()
        hello = {"secret": secret, "pid": os.getpid(), "listens": listener.getsockname()}
        wire.send(group, Message(Kind.HELLO, hello))
        serve(group, listener)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the group drains, then lets go
    secret = os.environ.pop(SECRET_VARIABLE, "")
    run(sys.argv[1], secret)


if __name__ == "__main__":
    main()
