"""A start for the retraining of groups, solved in closed form.

In a group, a sub-block reads a stream that lacks the outputs of its neighbours. A linear map of
what it reads predicts what it read in the standard model. Least squares finds the map, and the
sub-block's input matrices take it in: W (I + M) reads like W after the map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.progress import Progress
from torch import Tensor

from ladderstitch.text.model.residual import LayerPlan, ResidualScheme, plan_layers, split_groups
from ladderstitch.training.text.trainable_llama import LowRank, TrainableLlama

RIDGE = 0.01
"""Weight of the penalty of large maps, relative to the mean square of the inputs."""
ATTENTION_INPUTS = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
MLP_INPUTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


@torch.no_grad()
def fit_groups(
    model: TrainableLlama,
    plans: Sequence[LayerPlan],
    adapters: Mapping[str, LowRank],
    text: Tensor,
    progress: Progress,
) -> None:
    """Set the adapters of all groups of more than one layer, on windows [W, T + 1] of a text.

    Each group is fitted alone, to what its layers read in the standard model. Other adapters stay
    as they are.
    """
    layers = model.config.layers
    standard = plan_layers(ResidualScheme(), layers, 1)
    task = progress.add_task("fitting groups", total=layers)
    with torch.autocast("cpu", torch.bfloat16):
        stream = model.embed(text[:, :-1])
        for group in split_groups(range(layers), plans):
            if len(group) > 1:
                _fit_group(model, group, adapters, stream.full)
            stream = model.run(stream, group, standard)
            progress.advance(task, len(group))


def _fit_group(
    model: TrainableLlama, group: Sequence[int], adapters: Mapping[str, LowRank], read: Tensor
) -> None:
    """Set the adapters of the layers of a group that reads the stream [W, T, D]."""
    wanted, x = [], read
    for layer in group:
        mixed = x + model.attention(x, layer)
        wanted.append((model.attention_input(x, layer), model.mlp_input(mixed, layer)))
        x = mixed + model.mlp(mixed, layer)
    mixed = read
    for layer, (for_attention, _) in zip(group, wanted, strict=True):
        if layer != group[0]:  # the first one reads what it did
            given = model.attention_input(read, layer)
            _fit_matrices(model, layer, ATTENTION_INPUTS, adapters, given, for_attention)
        mixed = mixed + model.attention(read, layer, adapters)
    for layer, (_, for_mlp) in zip(group, wanted, strict=True):
        given = model.mlp_input(mixed, layer)
        _fit_matrices(model, layer, MLP_INPUTS, adapters, given, for_mlp)


def _fit_matrices(
    model: TrainableLlama,
    layer: int,
    names: Sequence[str],
    adapters: Mapping[str, LowRank],
    given: Tensor,
    wanted: Tensor,
) -> None:
    """Set the adapters of a layer's matrices that read `given` [.., D] in place of `wanted`."""
    with torch.autocast("cpu", enabled=False):
        x, missing = given.flatten(0, -2).float(), (wanted - given).flatten(0, -2).float()
        moments = x.T @ x
        ridge = moments + RIDGE * moments.diagonal().mean() * torch.eye(len(moments))
        change = torch.linalg.solve(ridge, x.T @ missing).T
        root = torch.linalg.cholesky(ridge)
        for name in names:
            tensor = f"model.layers.{layer}.{name}"
            adapters[tensor].set_product(model.tensors[tensor].float() @ change, root)
