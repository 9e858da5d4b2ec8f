"""Stitching maps of a language family: least squares, and the error of translated keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.model.family import MapName
from ladderstitch.text.model.family_weights import STITCHES
from ladderstitch.training.affine_fit import AffineFit
from ladderstitch.training.text.family_routes import anchor_pairs
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
    for layer in range(family.layers):
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
    widths = [model.config.hidden_size for model in family.models]
    pairs = anchor_pairs(len(widths))
    fits = {
        (front, end, layer): AffineFit(widths[front], widths[end])
        for front, end in pairs
        for layer in range(1, family.layers)
    }
    for part in torch.split(windows, FIT_WINDOWS):
        streams = [run_anchor(family, anchor, part)[0] for anchor in range(len(widths))]
        for (front, end, layer), fit in fits.items():
            for lag in range(family.plans[layer].lag + 1):
                x, y = (streams[anchor][layer].read(lag) for anchor in (front, end))
                fit.add(x.flatten(0, 1), y.flatten(0, 1))
        on_progress(len(part))
    explained = {}
    for place, fit in fits.items():
        weight, bias = fit.solve()
        name = MapName(*place)
        family.tensors[STITCHES + name.weight].copy_(weight)
        family.tensors[STITCHES + name.bias].copy_(bias)
        explained[STITCHES + ".".join(map(str, place))] = fit.explained(weight, bias)
    return explained


def translation_error(family: TrainableFamily, streams: Sequence[Sequence[StreamState]]) -> Tensor:
    """Return the mean error of translated keys and values, relative to their own mean square.

    `streams` has those of `run_anchor` for each anchor on the same tokens.
    """
    errors = []
    positions = torch.arange(streams[0][0].full.shape[1])
    for front, end in anchor_pairs(len(streams)):
        model = family.models[end]
        for layer in range(1, family.layers):
            lag = family.plans[layer].lag
            mapped = family.apply_map(front, end, layer, streams[front][layer].read(lag))
            found = model.keys_values(mapped, layer, positions)
            with torch.no_grad():
                expected = model.keys_values(streams[end][layer].read(lag), layer, positions)
            for got, want in zip(found, expected, strict=True):
                square = want.float().square().mean()
                errors.append(F.mse_loss(got.float(), want.float()) / square)
    return torch.stack(errors).mean()


def half_precision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as a bundle stores them."""
    return {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
