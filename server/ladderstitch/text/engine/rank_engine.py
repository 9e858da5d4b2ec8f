"""What a rank computes: the forward passes of its shard, with its cache and its communicator."""

from __future__ import annotations

import logging
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ladderstitch.runtime.cuda_graphs import CudaGraphs
from ladderstitch.runtime.device import use_device
from ladderstitch.runtime.process import trim_heap
from ladderstitch.text.comm.base import (
    CommSpec,
    Communicator,
    SingleRankCommunicator,
)
from ladderstitch.text.engine.communicators import create_communicator
from ladderstitch.text.engine.rank_config import Assignment
from ladderstitch.text.engine.rank_models import load_models
from ladderstitch.text.messages import (
    Kind,
    LogitsMode,
    Message,
    SequenceInput,
    Step,
    Translation,
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


MAX_CAPTURED_SEQUENCES = 64
"""Sequences of the largest step that is captured; the launches of larger ones cost little."""


class RankEngine:
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
