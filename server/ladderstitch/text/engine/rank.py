"""A rank: the process that holds one shard of a language model and runs its forward passes.

A rank is started as `python -m ladderstitch.text.engine.rank ADDRESS` on the group's machine, and
reads the group's secret from its standard input. On another machine, an operator starts it with
`ladderstitch rank`. It exits when the group disconnects.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ladderstitch.addresses import split_address
from ladderstitch.runtime.cuda_graphs import CudaGraphs
from ladderstitch.runtime.device import use_device
from ladderstitch.runtime.process import trim_heap
from ladderstitch.text.comm.base import (
    CommSpec,
    Communicator,
    NcclSpec,
    PeerLost,
    SharedMemorySpec,
    SingleRankCommunicator,
    SingleSpec,
    SymmetricSpec,
    TcpSpec,
)
from ladderstitch.text.engine.rank_config import Assignment, CommInit, RankConfig
from ladderstitch.text.engine.rank_models import load_models
from ladderstitch.text.messages import (
    Kind,
    LogitsMode,
    Message,
    SequenceInput,
    Step,
    Translation,
    receive_message,
    send_message,
)
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch, find_sequences, select_rows
from ladderstitch.text.model.graphed_decoder import GraphedDecoder, StepOutput, compute_step
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.model.segments import SegmentedTransformer
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.stitched import FamilyPath
from ladderstitch.text.model.stitched_segments import SegmentedPath
from ladderstitch.text.model.transformer import Transformer

log = logging.getLogger(__name__)

SECRET_VARIABLE = "LADDERSTITCH_RANK_SECRET"
"""Environment variable for the secret of a rank that is started by hand."""
CONNECT_TIMEOUT_S = 20.0
MAX_ERROR_CHARACTERS = 4096
MAX_CAPTURED_SEQUENCES = 64
"""Sequences of the largest step that is captured; the launches of larger ones cost little."""


class Rank:
    """One shard of a model with its cache and its communicator.

    `init_comm` replaces the communicator when the group has replaced a rank.
    """

    def __init__(self, assignment: Assignment) -> None:
        """Load the shard; raises `BundleError` or `ConfigError` if that is not possible."""
        config = assignment.rank_config
        torch.set_num_threads(config.threads)
        use_device(config.device, assignment.rank)
        started, anonymous = time.monotonic(), anonymous_bytes()
        self.rank_config = config
        self.shard = Shard.of(config.model, assignment.rank, config.ranks)
        notes: list[str] = []
        self.models = load_models(config, self.shard, notes)
        family, paths = config.family, range(len(config.paths))
        self.cache = PagedCache(
            config.model,
            self.shard,
            config.blocks + (config.device != "cpu"),  # one for the padding of captured steps
            config.block_tokens,
            config.cache_dtype,
            config.device,
            config.threads if all(map(self._computes_in_onnx, paths)) else 1,
            family.num_planes,
            [len(Shard.of(a, assignment.rank, config.ranks).heads) for a in family.anchors],
        )
        self.planes = [
            [family.plane_number(plane.anchor, plane.layer) for plane in family.planes(route)]
            if config.anchors
            else None  # all of them
            for route in config.path_routes
        ]
        trim_heap()
        self.comm: Communicator | None = None
        self.path_plans: list[tuple[tuple[LayerPlan, ...], Communicator]] = []
        self.graphs: dict[int, GraphedDecoder] = {}
        self.load_stats = {
            "weight_bytes": self.models[0].weight_bytes,
            "cache_bytes": self.cache.bytes + self._boundary_bytes,
            "memory_bytes": anonymous_bytes() - anonymous,
            "seconds": time.monotonic() - started,
            "notes": notes,
        }

    @property
    def _boundary_bytes(self) -> int:
        """The memory of the streams from which a family's keys are translated, in bytes."""
        first = self.models[0]
        return first.model.boundaries.bytes if isinstance(first, FamilyPath) else 0

    def init_comm(self, spec: CommSpec, listener: socket.socket) -> None:
        """Close the old communicator, if any, and connect to the peers with a new one."""
        if self.comm is not None:
            self.comm.close()
        config = self.rank_config
        comm = create_communicator(spec, config, self.shard, listener)
        silent = SingleRankCommunicator(self.shard.rank, self.shard.ranks)
        self.comm = comm
        self.path_plans = [
            (
                config.plans(path),
                silent if residual.scheme == "no_communication" else comm,
            )
            for path, residual in enumerate(config.paths)
        ]
        self._capture_graphs()

    def forward(self, message: Message) -> Message:
        """Run a `FORWARD` message and return a `LOGITS` message.

        Its header has the best tokens of this rank's vocabulary rows, with their logits, and the
        numbers of the sequences that are not finite. Its body has the whole logits [L, V_r] of the
        sequences that need them.
        """
        step = Step.unpack(message.header, message.body)
        best_rows, logits_rows, _ = select_rows(step.inputs)
        output = self._compute(step)
        best = output.best.tolist() if best_rows else []
        tokens = output.best_tokens.tolist() if best_rows else []
        whole = np.ascontiguousarray(output.logits[logits_rows].cpu().numpy())
        header = {
            "best": [best[row] for row in best_rows],
            "tokens": [tokens[row] + self.shard.vocabulary.start for row in best_rows],
            "shape": whole.shape,
            "non_finite": find_sequences(step.inputs, ~output.finite),
        }
        return Message(Kind.LOGITS, header, whole.data.cast("B") if whole.size else b"")

    def _compute(self, step: Step) -> StepOutput:
        """Run a step: as a graph if it has one, else kernel by kernel."""
        graphs = self.graphs.get(step.path)
        if graphs is not None and graphs.can_run(step):
            return graphs(step)
        batch = Batch(step, self.rank_config.block_tokens, self.rank_config.device)
        plans, comm = self.path_plans[step.path]
        model = self.models[step.path]
        torch.set_num_threads(1 if self._computes_in_onnx(step.path) else self.rank_config.threads)
        for translation in step.translations:
            self._translate(translation)
        output = compute_step(
            lambda: model.forward(batch, self.cache, plans, comm),
            self.cache,
            batch,
            batch.output_rows,
            self.planes[step.path],
        )
        if step.write_through:
            self._write_through(step.path, batch)
        return output

    def _translate(self, translation: Translation) -> None:
        """Fill the planes that the target path of a translation reads."""
        config, model = self.rank_config, self.models[translation.target]
        if not isinstance(model, FamilyPath):
            return  # all paths of other models write the same planes
        source, target = (
            config.path_routes[path] for path in (translation.source, translation.target)
        )
        comm, size = self.path_plans[translation.target][1], config.max_batched_tokens
        for begin in range(0, len(translation.tokens), size):  # a partial must fit the link
            part = translation.tokens[begin : begin + size]
            start = translation.start + begin
            tokens = SequenceInput(part, start, translation.blocks, LogitsMode.NONE)
            batch = Batch(Step((tokens,)), config.block_tokens, config.device)
            model.model.translate(batch, self.cache, source, target, comm)

    def _write_through(self, path: int, batch: Batch) -> None:
        """Fill the planes that the path of a batch does not write."""
        model, comm = self.models[path], self.path_plans[path][1]
        if isinstance(model, FamilyPath):
            model.model.translate_all(batch, self.cache, model.route, comm)

    def _capture_graphs(self) -> None:
        """Capture the decoding steps of all paths on a GPU, if the model is on one rank.

        A path whose capture fails runs kernel by kernel.
        """
        config = self.rank_config
        reads_spans = (
            config.model.windowed_layers
            or config.model.attention_softcap
            or config.model.alibi_bias_max
        )
        if not self.cache.uses_kernels or config.ranks > 1 or reads_spans or config.anchors:
            return
        backend = CudaGraphs()
        for path, (model, (plans, comm)) in enumerate(
            zip(self.models, self.path_plans, strict=True)
        ):
            assert isinstance(model, Transformer), "only CPUs compute in segments"
            try:
                self.graphs[path] = GraphedDecoder(
                    model,
                    self.cache,
                    plans,
                    comm,
                    sequences=min(config.max_batched_tokens, MAX_CAPTURED_SEQUENCES),
                    sequence_blocks=config.sequence_blocks,
                    spare_block=config.blocks,
                    backend=backend,
                )
            except Exception:  # the errors of CUDA and its libraries have no common class
                log.exception("capture failed path=%d; it runs kernel by kernel", path)

    def leave_group(self) -> None:
        """Close the communicator after a failed pass, so that no peer waits for this rank.

        On GPUs this could block; there, the group restarts the peers.
        """
        if self.comm is not None and self.rank_config.device == "cpu":
            self.comm.close()

    def _computes_in_onnx(self, path: int) -> bool:
        """Return whether the products of a path run in ONNX Runtime.

        Its threads and those of torch would take the cores from each other.
        """
        is_low_bit = self.rank_config.path_precisions[path] is not None
        return is_low_bit or isinstance(self.models[path], SegmentedTransformer | SegmentedPath)


def anonymous_bytes() -> int:
    """Return the resident memory of this process that no file backs, in bytes; 0 if unknown."""
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def create_communicator(
    spec: CommSpec, config: RankConfig, shard: Shard, listener: socket.socket
) -> Communicator:
    """Return this rank's communicator, connected to all peers.

    Raises `ConfigError` if this machine does not support the kind, `PeerLost` if a peer cannot be
    reached.
    """
    match spec:
        case SharedMemorySpec():
            from ladderstitch.text.comm.shared_memory import EmulatedLink, SharedMemoryCommunicator

            link = EmulatedLink(spec.latency_s, spec.bytes_per_s or float("inf"))
            return SharedMemoryCommunicator(
                spec.path, shard.rank, shard.ranks, spec.slot_bytes, link
            )
        case TcpSpec():
            from ladderstitch.text.comm.tcp import TcpCommunicator

            return TcpCommunicator(listener, shard.rank, spec.addresses, spec.secret.encode())
        case NcclSpec():
            from ladderstitch.text.comm.nccl import NcclCommunicator

            if shard.rank == 0:
                listener.close()  # NCCL's store listens on this address
            return NcclCommunicator(spec.store, shard.rank, shard.ranks)
        case SymmetricSpec():
            from ladderstitch.text.comm.symmetric import (
                SymmetricCommunicator,
                open_symmetric_memory,
            )

            if shard.rank == 0:
                listener.close()
            device = torch.device(config.device)
            memory = open_symmetric_memory(spec.path, spec.store, shard.rank, shard.ranks, device)
            rows, width = config.max_batched_tokens, config.family.width
            return SymmetricCommunicator(memory, spec.path, rows, width, config.torch_dtype, device)
        case SingleSpec():
            return SingleRankCommunicator()


def serve(group: socket.socket, listener: socket.socket) -> None:
    """Answer the group's messages until it closes the socket.

    An error is reported to the group and does not end the rank.
    """
    rank: Rank | None = None
    while True:
        try:
            message = receive_message(group)
        except (EOFError, OSError):
            return
        try:
            if message.kind == Kind.PING:
                reply = Message(Kind.READY)
            elif message.kind == Kind.LOAD_MODEL:
                rank = Rank(Assignment.model_validate(message.header))
                reply = Message(Kind.MODEL_LOADED, rank.load_stats)
            elif rank is None:
                reply = Message(Kind.FAILED, {"error": "expected LOAD_MODEL first"})
            elif message.kind == Kind.INIT_COMM:
                rank.init_comm(CommInit.model_validate(message.header).spec, listener)
                reply = Message(Kind.READY)
            else:
                reply = rank.forward(message)
        except Exception as error:
            reply = _failure(error)
            if rank is not None:
                rank.leave_group()
        try:
            send_message(group, reply)
        except OSError:
            return


def _failure(error: Exception) -> Message:
    reason = f"{type(error).__name__}: {error}"
    log.warning("request failed: %s", reason)
    header = {"error": reason[:MAX_ERROR_CHARACTERS], "peer_lost": isinstance(error, PeerLost)}
    return Message(Kind.FAILED, header)


def connect(address: str) -> socket.socket:
    """Return a connection to a group's address, `unix:PATH` or `HOST:PORT`.

    Raises `OSError` if the group cannot be reached.
    """
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix("unix:"))
        return connection
    connection = socket.create_connection(split_address(address), timeout=CONNECT_TIMEOUT_S)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _listen_beside(group: socket.socket) -> socket.socket:
    """Return a listener for other ranks, on the address that leads to the group, or on loopback."""
    if group.family == socket.AF_UNIX:
        return socket.create_server(("127.0.0.1", 0))
    return socket.create_server((group.getsockname()[0], 0), family=group.family)


def run(address: str, secret: str) -> None:
    """Run as a rank of the group at an address until the group disconnects.

    Raises `OSError` if the group cannot be reached.
    """
    with connect(address) as group, _listen_beside(group) as listener:
        registration = {
            "secret": secret,
            "pid": os.getpid(),
            "comm_address": listener.getsockname()[:2],
        }
        send_message(group, Message(Kind.REGISTER, registration))
        serve(group, listener)


def main() -> None:
    """Run as a rank of the group at the address in the first argument.

    Without `SECRET_VARIABLE`, the secret is read from standard input.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the group drains and disconnects
    secret = os.environ.pop(SECRET_VARIABLE, None)
    run(sys.argv[1], sys.stdin.read().strip() if secret is None else secret)


if __name__ == "__main__":
    main()
