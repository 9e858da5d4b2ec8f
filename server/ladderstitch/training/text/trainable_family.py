"""A trainable stitched language family: whole sequences whose tokens take different paths.

Where the path of a token changes anchor, an affine map translates its stream. A query sees keys and
values of its own anchor only: those of tokens that did not run the layer are translated from their
streams by the same maps (`_translated`).

A plane is one layer of one anchor. Planes run in the order of `FamilyPass`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import DecoderFamily, Plane
from ladderstitch.text.model.family_weights import STITCHES, anchor_prefix
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.training.text.family_pass import FamilyPass
from ladderstitch.training.text.family_routes import Route, Span
from ladderstitch.training.text.trainable_llama import Context, StreamState, TrainableLlama


class TrainableFamily:
    """Anchors, smallest first, and stitching maps over tensors by their names in a bundle.

    All anchors have the same residual plans and shape of keys and values; there are as many plans
    as the deepest anchor has layers.
    """

    def __init__(
        self,
        configs: Sequence[DecoderConfig],
        tensors: Mapping[str, Tensor],
        plans: Sequence[LayerPlan],
    ) -> None:
        self.decoders = DecoderFamily(tuple(configs))
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
        current = FamilyPass.of(self.decoders, spans, tokens)
        for plane in current.order:
            current.after[plane] = self.models[plane.anchor].run(
                self._before(plane, current.taken[plane], current),
                [plane.layer],
                self.plans,
                context=self._context(plane, current),
            )
        hidden = {}
        for anchor, model in enumerate(self.models):
            last = Plane(anchor, model.config.layers - 1)
            if last in current.after:
                hidden[anchor] = current.taken[last], model.final_hidden(current.after[last])
        return hidden

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
        name = self.decoders.map_name(front, end, layer)
        offset = self.tensors[STITCHES + name.bias] if bias else None
        return F.linear(x, self.tensors[STITCHES + name.weight], offset).float()

    def _before(self, plane: Plane, positions: Tensor, current: FamilyPass) -> StreamState:
        """Return the stream before a plane of the tokens at some of the positions that run it."""
        if plane.layer == 0:
            return self.models[plane.anchor].embed(current.tokens[:, positions])
        parts: list[StreamState] = []
        found: list[Tensor] = []
        for front, arriving in current.previous[plane].items():
            chosen = arriving[torch.isin(arriving, positions)]
            if not len(chosen):
                continue
            stream, there = current.after[front], current.taken[front]
            lagged, last = stream.lagged, stream.last
            if len(chosen) < len(there):
                rows = torch.searchsorted(there, chosen)
                lagged, last = lagged[:, rows], last[:, rows]
            if front.anchor != plane.anchor:
                lagged = self.apply_map(front.anchor, plane.anchor, plane.layer, lagged)
                last = self.apply_map(front.anchor, plane.anchor, plane.layer, last, bias=False)
            parts.append(StreamState(lagged, last))
            found.append(chosen)
        return StreamState(
            _in_order(found, [part.lagged for part in parts]),
            _in_order(found, [part.last for part in parts]),
        )

    def _context(self, plane: Plane, current: FamilyPass) -> Context | None:
        """Return what the tokens of a plane see there; None if all tokens run it."""
        own = current.taken[plane]
        if len(own) == current.tokens.shape[1]:
            return None
        # Tokens after the last query are seen by none.
        seen = {front: p[p < own[-1]] for front, p in current.origins(plane).items()}
        seen = {front: p for front, p in seen.items() if len(p)}
        positions = [own, *seen.values()]

        def exchange(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            others = [self._translated(front, plane, at, current) for front, at in seen.items()]
            return (
                _in_order(positions, [keys, *(k.to(keys.dtype) for k, _ in others)]),
                _in_order(positions, [values, *(v.to(values.dtype) for _, v in others)]),
            )

        everything = torch.cat(positions).sort().values
        return Context(own, exchange, everything[None] <= own[:, None])

    def _translated(
        self, front: Plane, plane: Plane, positions: Tensor, current: FamilyPass
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, T, K, d] of a plane for T tokens that run `front` instead.

        They are computed from what the layer's attention would read, which the map predicts from
        what it reads in `front`. Before layer 0 this is the embedding, known for all anchors.
        """
        model, lag = self.models[plane.anchor], self.plans[plane.layer].lag
        if plane.layer == 0:
            read = model.embed(current.tokens[:, positions]).read(lag)
        else:
            own = self._before(front, positions, current).read(lag)
            read = self.apply_map(front.anchor, plane.anchor, plane.layer, own)
        return model.keys_values(read, plane.layer, positions)


def _in_order(positions: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of parts [B, T_i, ..] as one tensor, in the order of their positions."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), dim=1)[:, torch.cat(list(positions)).argsort()]
