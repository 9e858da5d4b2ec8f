"""Stitching maps of a language family: least squares, and the error of translated keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.model.family_weights import STITCHES
from ladderstitch.training.affine_fit import AffineFit
from ladderstitch.training.text.trainable_family import TrainableFamily
from ladderstitch.training.text.trainable_llama import StreamState

FIT_WINDOWS = 8
"""Windows whose streams are in memory at a time."""


def run_anchor(
    family: TrainableFamily, anchor: int, tokens: Tensor
) -> tuple[list[StreamState], Tensor]:
    """Run one anchor on tokens [B, T].

    Returns the stream before each layer, and the normed final stream.
    """
    model, streams = family.models[anchor], []
    stream = model.embed(tokens)
    for layer in range(model.config.layers):
        streams.append(stream)
        stream = model.run(stream, [layer], family.plans)
    return streams, model.final_hidden(stream)


@torch.no_grad()
def fit_maps(
    family: TrainableFamily, windows: Tensor, on_progress: Callable[[int], None] = lambda n: None
) -> dict[str, float]:
    """Set every map to the least-squares solution on windows [W, T] of tokens; in place.

    The rows are the complete streams, and in a ladder also those without the last sub-block's
    output. Attention reads the latter, and sub-blocks after a stitch read both.

    Returns the share of the variance that each map explains, by its name. `on_progress` is called
    with the number of windows after each part. Raises `DataError` if a stream is not finite.
    """
    names = [name for name, _ in family.decoders.maps()]
    widths = [model.config.hidden_size for model in family.models]
    fits = {name: AffineFit(widths[name.front], widths[name.end]) for name in names}
    for part in torch.split(windows, FIT_WINDOWS):
        streams = [run_anchor(family, anchor, part)[0] for anchor in range(len(widths))]
        for name, fit in fits.items():
            front, end = streams[name.front][name.front_layer], streams[name.end][name.layer]
            for lag in range(family.plans[name.layer].lag + 1):
                fit.add(front.read(lag).flatten(0, 1), end.read(lag).flatten(0, 1))
        on_progress(len(part))
    explained = {}
    for name, fit in fits.items():
        weight, bias = fit.solve()
        family.tensors[STITCHES + name.weight].copy_(weight)
        family.tensors[STITCHES + name.bias].copy_(bias)
        explained[STITCHES + name.stem] = fit.explained(weight, bias)
    return explained


def translation_error(family: TrainableFamily, streams: Sequence[Sequence[StreamState]]) -> Tensor:
    """Return the mean error of translated keys and values, relative to their own mean square.

    `streams` has those of `run_anchor` for each anchor on the same tokens.
    """
    errors = []
    positions = torch.arange(streams[0][0].full.shape[1])
    for name, _ in family.decoders.maps():
        model, layer = family.models[name.end], name.layer
        lag = family.plans[layer].lag
        front, end = streams[name.front][name.front_layer], streams[name.end][layer]
        mapped = family.apply_map(name.front, name.end, layer, front.read(lag))
        found = model.keys_values(mapped, layer, positions)
        with torch.no_grad():
            expected = model.keys_values(end.read(lag), layer, positions)
        for got, want in zip(found, expected, strict=True):
            square = want.float().square().mean()
            errors.append(F.mse_loss(got.float(), want.float()) / square)
    return torch.stack(errors).mean()


def half_precision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as a bundle stores them."""
    return {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
