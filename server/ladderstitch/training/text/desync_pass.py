"""The pass of a desync model in training: the streams of all its ranks, in one process.

Source: Ladder Residual (arXiv 2501.06589), section on Desync Residual; `text.model.residual`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.model.shard import Shard
from ladderstitch.training.text.trainable_llama import StreamState, TrainableLlama


def desync_logits(
    model: TrainableLlama, tokens: Tensor, plans: Sequence[LayerPlan], ranks: int
) -> Tensor:
    """Return the logits [B, T, V] of tokens [B, T], of a model that is defined for `ranks`."""
    parts = [_shard(model, Shard.of(model.config, rank, ranks)) for rank in range(ranks)]
    streams = [model.embed(tokens).full] * ranks
    for layer, plan in enumerate(plans):
        assert plan.reduce is not None, "expected the plans of a desync model"
        for block, reduces in zip(("attention", "mlp"), plan.reduce, strict=True):
            outputs = [
                getattr(part, block)(stream, layer)
                for part, stream in zip(parts, streams, strict=True)
            ]
            if reduces:
                shares = [o + s / ranks for o, s in zip(outputs, streams, strict=True)]
                streams = [functools.reduce(torch.add, shares)] * ranks
            else:
                streams = [o + s for o, s in zip(outputs, streams, strict=True)]
    last = StreamState(streams[0], torch.zeros_like(streams[0]))
    return F.linear(model.final_hidden(last), model.head)


def _shard(model: TrainableLlama, shard: Shard) -> TrainableLlama:
    """Return one rank's part of a model; its tensors are slices, through which gradients flow."""
    config = model.config
    own = config.model_copy(update={"heads": len(shard.heads), "kv_heads": len(shard.kv_heads)})
    return TrainableLlama(own, _slices(model.tensors, config, shard))


def _slices(
    tensors: Mapping[str, Tensor], config: DecoderConfig, shard: Shard
) -> dict[str, Tensor]:
    lanes = torch.arange(config.head_dim)
    queries = (torch.tensor(shard.heads)[:, None] * config.head_dim + lanes).flatten()
    keys = (torch.tensor(shard.kv_heads)[:, None] * config.head_dim + lanes).flatten()
    columns = torch.tensor([column for part in shard.ffn for column in part])
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    rows |= {"gate_proj": columns, "up_proj": columns}
    sliced = {}
    for name, tensor in tensors.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind in rows:
            tensor = tensor[rows[kind]]
        elif kind in ("o_proj", "down_proj"):
            tensor = tensor[:, queries if kind == "o_proj" else columns]
        sliced[name] = tensor
    return sliced
