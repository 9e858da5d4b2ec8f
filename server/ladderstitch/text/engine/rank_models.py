"""The models of one rank: one per path, which share the tensors that no delta changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ladderstitch.runtime.library_choice import measure_products
from ladderstitch.runtime.low_bit import BITS, LowBitPrecision
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.model.family_weights import anchor_weights, stitch_weights
from ladderstitch.text.model.segments import SEGMENT_SCHEMES, SegmentedTransformer
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.stitched import (
    BoundaryCache,
    FamilyPath,
    StitchedModel,
    StitchedPath,
    load_maps,
)
from ladderstitch.text.model.stitched_segments import FamilySegments, SegmentedPath
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import (
    EMBEDDING,
    LAYERS,
    UP,
    DeltaWeights,
    Weights,
    load_delta,
    touched_layers,
)
from ladderstitch.text.model.weights import LayerWeights, RankWeights, load_layer, load_rank

MAX_GRAPH_BYTES = 1 << 30
"""Largest float32 head in a graph, whose serialised form is limited to 2 GiB."""
RankModel = Transformer | SegmentedTransformer | FamilyPath
"""A model of one rank; all kinds have the same `forward`."""


def load_family(config: RankConfig, shard: Shard) -> list[RankModel]:
    """Return one rank's model of every path of a family; all share anchors and stitching layers.

    In float32 on one rank of a CPU, ONNX Runtime computes the layers and translates the cache, and
    its sessions hold all weights but the embeddings, which files back. Elsewhere torch does.
    """
    reader, family = config.weights(), config.family
    parts = anchor_weights(reader, len(family.anchors))
    shards = [Shard.of(anchor, shard.rank, shard.ranks) for anchor in family.anchors]
    configs = [anchor.limited_to(config.max_model_len) for anchor in family.anchors]
    weights = [
        load_rank(part, anchor, own, config.torch_dtype, config.device)
        for anchor, part, own in zip(family.anchors, parts, shards, strict=True)
    ]
    maps = load_maps(stitch_weights(reader), family, config.torch_dtype, config.device)
    slots = config.blocks * config.block_tokens
    boundaries = BoundaryCache(family, slots, config.torch_dtype, config.device)
    if (config.dtype, config.device, config.ranks) != ("float32", "cpu", 1):
        anchors = [
            Transformer(anchor, held, own, config.threads, family.plane_number(number))
            for number, (anchor, held, own) in enumerate(zip(configs, weights, shards, strict=True))
        ]
        model = StitchedModel(family, anchors, maps, boundaries)
        return [StitchedPath(model, route) for route in config.path_routes]
    segmented = [
        SegmentedTransformer(
            anchor,
            held,
            config.threads,
            lagged=True,
            embedding=part.read(EMBEDDING, own.vocabulary),
        )
        for anchor, held, part, own in zip(configs, weights, parts, shards, strict=True)
    ]
    segments = FamilySegments(family, segmented, weights, maps, boundaries, config.threads)
    return [SegmentedPath(segments, route) for route in config.path_routes]


def load_models(
    config: RankConfig, shard: Shard, notes: list[str] | None = None
) -> list[RankModel]:
    """Return one rank's model of every path; add what was chosen to `notes`, for the log.

    Paths of one precision share the tensors that no delta changes, except that a low-bit path with
    a delta has sessions of its own.
    """
    if config.anchors:
        return load_family(config, shard)
    reader = config.weights()
    models: list[RankModel] = []
    shared: dict[LowBitPrecision | None, RankWeights] = {}
    in_segments: dict[LowBitPrecision | None, bool] = {}
    bases: dict[LowBitPrecision | None, RankModel] = {}
    for precision, file in zip(config.path_precisions, config.path_deltas, strict=True):
        options = ShardOptions(config, shard, precision, [] if notes is None else notes)
        if precision not in shared:
            shared[precision] = options.load_rank(reader)
            in_segments[precision] = options.uses_segments(shared[precision])
        weights, segmented = shared[precision], in_segments[precision]
        if file is None:
            if precision not in bases:
                bases[precision] = options.make_model(weights, reader, segmented=segmented)
            models.append(bases[precision])
            continue
        delta = load_delta(file)
        changed = DeltaWeights(reader, delta)
        weights = options.load_changed(weights, changed, delta)
        models.append(options.make_model(weights, changed, segmented=segmented))
    return models


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """The way in which one rank loads and runs the paths of one precision."""

    config: RankConfig
    shard: Shard
    precision: LowBitPrecision | None
    notes: list[str]
    """What was chosen while loading, for the log."""

    @property
    def _common(self) -> dict[str, Any]:
        config, bits = self.config, BITS[self.precision] if self.precision else None
        return {
            "config": config.model,
            "shard": self.shard,
            "dtype": torch.float32 if bits else config.torch_dtype,
            "device": config.device,
            "shared_norm": config.shared_norm,
            "bits": bits,
        }

    def load_rank(self, reader: Weights, layers: Sequence[int] | None = None) -> RankWeights:
        """Return this rank's tensors, with these layers; unset: all."""
        return load_rank(reader, **self._common, layers=layers)

    def load_changed(
        self, weights: RankWeights, reader: Weights, delta: Mapping[str, Tensor]
    ) -> RankWeights:
        """Return this rank's tensors with those that a delta changes, which `reader` applies."""
        if any(not name.startswith(LAYERS) for name in delta):
            own = self.load_rank(reader, layers=())
            weights = replace(weights, norm=own.norm, norm_bias=own.norm_bias, head=own.head)
            if EMBEDDING + UP in delta:
                weights = replace(weights, embedding=own.embedding)
        layers = list(weights.layers)
        for layer in touched_layers(delta):
            layers[layer] = self.load_layer(reader, layer)
        return replace(weights, layers=tuple(layers))

    def load_layer(self, reader: Weights, layer: int) -> LayerWeights:
        """Return this rank's tensors of one layer."""
        return load_layer(reader, layer, **self._common)

    @property
    def _schemes(self) -> set[str]:
        """The residual schemes of the paths of this precision."""
        pairs = zip(self.config.path_precisions, self.config.paths, strict=True)
        return {path.scheme for precision, path in pairs if precision == self.precision}

    def uses_segments(self, weights: RankWeights) -> bool:
        """Return whether dtype, device, ranks, schemes and size permit segments.

        In float32 they must also be as fast as torch, which is measured.
        """
        config, in_float32 = self.config, self.precision is None
        fits = not in_float32 or (
            (config.dtype, config.device) == ("float32", "cpu")
            and weights.head.nbytes <= MAX_GRAPH_BYTES
        )
        fits &= config.model.is_llama
        fits &= config.ranks == 1 and self._schemes <= SEGMENT_SCHEMES
        if not fits or not in_float32:
            return fits
        matrices = [layer.gate_up for layer in weights.layers]
        times = measure_products([m for m in matrices if isinstance(m, Tensor)], config.threads)
        self.notes.append(times.describe())
        return times.chosen == "onnxruntime"

    def make_model(self, weights: RankWeights, reader: Weights, *, segmented: bool) -> RankModel:
        """Return the model of a path."""
        config, model = self.config, self.config.model.limited_to(self.config.max_model_len)
        if not segmented:
            return Transformer(model, weights, self.shard, config.threads)
        return SegmentedTransformer(
            model,
            weights,
            config.threads,
            lagged="ladder" in self._schemes,
            embedding=reader.read(EMBEDDING, self.shard.vocabulary),
        )
