"""A trainable stitched language family: whole sequences whose tokens take different paths.

Each token runs each layer in one anchor. Where its path changes anchor, an affine map translates
its stream. A query sees keys and values of its own anchor only: those of tokens that ran the layer
in another anchor are translated from their streams by the same maps (`_translated`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import MapName
from ladderstitch.text.model.family_weights import STITCHES, anchor_prefix
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.training.text.family_routes import Route, Span
from ladderstitch.training.text.trainable_llama import Context, StreamState, TrainableLlama

Streams = dict[int, StreamState]
"""The streams [B, T_a, D_a] of the tokens that are in each anchor, in order of their positions."""
Places = dict[int, Tensor]
"""The positions [T_a] of the tokens that are in each anchor."""


class TrainableFamily:
    """Anchors, smallest first, and stitching maps over tensors by their names in a bundle.

    All anchors have the same number of layers, residual plans and shape of keys and values.
    """

    def __init__(
        self,
        configs: Sequence[DecoderConfig],
        tensors: Mapping[str, Tensor],
        plans: Sequence[LayerPlan],
    ) -> None:
        self.tensors, self.plans = tensors, plans
        self.models: list[TrainableLlama] = []
        for number, config in enumerate(configs):
            prefix = anchor_prefix(number, len(configs))
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{prefix}model.") or name == f"{prefix}lm_head.weight"
            }
            self.models.append(TrainableLlama(config, own))

    @property
    def layers(self) -> int:
        """Number of layers, the same in all anchors."""
        return len(self.plans)

    @property
    def largest(self) -> int:
        """Number of the largest anchor."""
        return len(self.models) - 1

    def final_hidden(
        self, tokens: Tensor, spans: Sequence[Span]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Run tokens [B, T] on the spans' paths, the same for all rows.

        Returns, for each anchor in which tokens end, their positions [T_a] and the normed streams
        [B, T_a, D_a], the input of its head. Raises `ConfigError` if the spans do not have T
        tokens.
        """
        owners = _owners(spans, tokens.shape[1], self.layers)
        streams: Streams = {}
        places: Places = {}
        for layer in range(self.layers):
            if layer == 0:
                places = _places(owners[0])
                streams = {a: self.models[a].embed(tokens[:, p]) for a, p in places.items()}
            elif not torch.equal(owners[layer], owners[layer - 1]):
                streams, places = self._cross(streams, owners[layer - 1], owners[layer], layer)
            streams = {
                anchor: self.models[anchor].run(
                    stream,
                    [layer],
                    self.plans,
                    context=self._context(anchor, layer, streams, places, tokens),
                )
                for anchor, stream in streams.items()
            }
        return {a: (places[a], self.models[a].final_hidden(s)) for a, s in streams.items()}

    def logits(self, tokens: Tensor, spans: Sequence[Span]) -> Tensor:
        """Return the logits [B, T, V] of tokens [B, T] on the spans' paths."""
        parts = self.final_hidden(tokens, spans)
        products = [F.linear(hidden, self.models[a].head) for a, (_, hidden) in parts.items()]
        return _in_order([positions for positions, _ in parts.values()], products)

    def path_logits(self, tokens: Tensor, route: Route) -> Tensor:
        """Return the logits [B, T, V] of tokens [B, T] that all take the same path."""
        return self.logits(tokens, [Span(route, tokens.shape[1])])

    def apply_map(
        self, front: int, end: int, layer: int, x: Tensor, *, bias: bool = True
    ) -> Tensor:
        """Return streams x [.., D_front] before a layer of `front` in the space of `end`.

        The bias belongs to one part of a stream only.
        """
        name = MapName(front, end, layer)
        offset = self.tensors[STITCHES + name.bias] if bias else None
        return F.linear(x, self.tensors[STITCHES + name.weight], offset).float()

    def _cross(
        self, streams: Streams, before: Tensor, after: Tensor, layer: int
    ) -> tuple[Streams, Places]:
        """Return the streams and places before a layer at which some tokens change anchor."""
        crossed, places = Streams(), _places(after)
        old = _places(before)
        for end in places:
            parts: list[StreamState] = []
            positions: list[Tensor] = []
            for front, stream in streams.items():
                chosen = (after[old[front]] == end).nonzero().flatten()
                if not len(chosen):
                    continue
                lagged, last = stream.lagged[:, chosen], stream.last[:, chosen]
                if front != end:
                    lagged = self.apply_map(front, end, layer, lagged)
                    last = self.apply_map(front, end, layer, last, bias=False)
                parts.append(StreamState(lagged, last))
                positions.append(old[front][chosen])
            crossed[end] = StreamState(
                _in_order(positions, [part.lagged for part in parts]),
                _in_order(positions, [part.last for part in parts]),
            )
        return crossed, places

    def _context(
        self, anchor: int, layer: int, streams: Streams, places: Places, tokens: Tensor
    ) -> Context | None:
        """Return what the tokens of an anchor see in a layer; None if all tokens are there."""
        if len(places) == 1:
            return None
        own = places[anchor]
        # Tokens after the last query are seen by none.
        seen = {a: p[p < own[-1]] for a, p in places.items() if a != anchor}
        seen = {a: p for a, p in seen.items() if len(p)}
        positions = [own, *seen.values()]

        def exchange(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            others = [
                self._translated(front, anchor, layer, streams[front], tokens, at)
                for front, at in seen.items()
            ]
            return (
                _in_order(positions, [keys, *(k.to(keys.dtype) for k, _ in others)]),
                _in_order(positions, [values, *(v.to(values.dtype) for _, v in others)]),
            )

        everything = torch.cat(positions).sort().values
        return Context(own, exchange, everything[None] <= own[:, None])

    def _translated(
        self,
        front: int,
        end: int,
        layer: int,
        stream: StreamState,
        tokens: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, T, K, d] of `end` for the first T tokens of `front`.

        They are computed from what the layer's attention would read, which the map predicts from
        what it reads in `front`. Before layer 0 this is the embedding, known for all anchors.
        """
        model, lag = self.models[end], self.plans[layer].lag
        if layer == 0:
            read = model.embed(tokens[:, positions]).read(lag)
        else:
            own = stream.read(lag)[:, : len(positions)]
            read = self.apply_map(front, end, layer, own)
        return model.keys_values(read, layer, positions)


def _owners(spans: Sequence[Span], tokens: int, layers: int) -> Tensor:
    """Return the anchor of every layer and token, [layers, T]."""
    if (total := sum(span.tokens for span in spans)) != tokens:
        raise ConfigError(f"spans: expected {tokens} tokens, got {total}")
    return torch.tensor(
        [
            [span.route.anchor(layer) for span in spans for _ in range(span.tokens)]
            for layer in range(layers)
        ]
    )


def _places(owner: Tensor) -> Places:
    """Return the positions in each anchor that has tokens, from the anchor of every token [T]."""
    return {int(anchor): (owner == anchor).nonzero().flatten() for anchor in torch.unique(owner)}


def _in_order(positions: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of parts [B, T_i, ..] as one tensor, in the order of their positions."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), dim=1)[:, torch.cat(list(positions)).argsort()]
