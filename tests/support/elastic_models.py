"""A tiny family of two anchors with random weights, and a definition of its forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ladderstitch.scheduling.profiles import Quality
from ladderstitch.text.manifest import TextManifest, TextVariant, write_manifest
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import DecoderFamily, LayerRange, Route
from ladderstitch.text.model.family_weights import family_shapes
from ladderstitch.text.model.residual import ResidualScheme
from tests.support.language_models import END, made_up_quality, write_byte_tokenizer

LARGE = DecoderConfig(
    vocab_size=257,
    hidden_size=40,
    intermediate_size=56,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=4,
    max_positions=128,
    tied_head=True,
)
SMALL = LARGE.model_copy(update={"hidden_size": 24, "intermediate_size": 36, "heads": 4})
FAMILY = DecoderFamily((SMALL, LARGE))
LADDER = ResidualScheme(scheme="ladder")


def route(front: int, end: int, layer: int) -> Route:
    """Return the route that runs `front` up to a layer, and `end` from there; 0: `end` alone."""
    parts = ((front, 0, layer - 1), (end, layer, LARGE.layers - 1))
    return tuple(LayerRange(anchor=a, first=f, last=n) for a, f, n in parts if f <= n)


def paths(residual: ResidualScheme = LADDER) -> tuple[TextVariant, ...]:
    """Return the small anchor, the paths from it to the large one, that anchor, and those back."""
    routes = {"small": route(0, 0, 0)}
    routes |= {f"small-{layer}+large": route(0, 1, layer) for layer in (3, 2, 1)}
    routes |= {"large": route(1, 1, 0)}
    routes |= {f"large-{layer}+small": route(1, 0, layer) for layer in (1, 2, 3)}
    return tuple(TextVariant(name=n, residual=residual, route=r) for n, r in routes.items())


def random_family(seed: int = 0, family: DecoderFamily = FAMILY) -> dict[str, Tensor]:
    """Return random tensors of a bundle of the family."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)
        for name, shape in family_shapes(family).items()
    }


class Definition:
    """The forward pass of a family over whole sequences, one token after the other, in float64.

    Every token may take another route. Keys and values of a layer that a token did not run are
    translated from the stream that the other anchor's layer read. There is one rank, and the
    stream is complete before it is mapped. `parallel`: both sub-blocks of a layer read one stream.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        lag: int = 0,
        parallel: bool = False,
        depths: tuple[int, int] = (4, 4),
    ) -> None:
        self._tensors, self._lag = {n: t.double() for n, t in tensors.items()}, lag
        self._depths, blocks = depths, (self._attention, self._mlp)
        self._groups = (blocks,) if parallel else tuple((block,) for block in blocks)
        dim = LARGE.head_dim
        frequencies = LARGE.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(128, dtype=torch.float64), frequencies)
        self._cosines, self._sines = angles.cos().float().double(), angles.sin().float().double()

    def logits(self, tokens: Sequence[int], routes: Sequence[Route]) -> Tensor:
        """Return the logits [T, V] of tokens, each on its own route."""
        read: list[dict[tuple[int, int], Tensor]] = []
        rows = []
        for position, (token, path) in enumerate(zip(tokens, routes, strict=True)):
            read.append({})
            before = last = torch.zeros(())
            for number, part in enumerate(path):
                if number:
                    source, end = path[number - 1].anchor, part.anchor
                    name = self._map_name(source, end, part.first)
                    assert f".{path[number - 1].last + 1}-" in f".{name.split('.')[-1]}-"
                    weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
                    before, last = F.linear(before, weight, bias), F.linear(last, weight)
                else:
                    before = self._tensor(part.anchor, "embed_tokens.weight")[token]
                    last = torch.zeros_like(before)
                for layer in range(part.first, part.last + 1):
                    for group in self._groups:
                        x = before if self._lag else before + last
                        if self._attention in group:
                            read[position][part.anchor, layer] = x
                        before = before + last
                        last = torch.stack(
                            [b(x, part.anchor, layer, position, tokens, read) for b in group]
                        ).sum(0)
            end = path[-1].anchor
            final = self._norm(before + last, self._tensor(end, "norm.weight"))
            rows.append(self._tensor(end, "embed_tokens.weight") @ final)
        return torch.stack(rows)

    def _paired(self, front: int, end: int, layer: int) -> int:
        """Return the first layer of `front` that is not before a layer of `end`, else the last."""
        own, other = self._depths[front], self._depths[end]
        return next((n for n in range(own) if n / own >= layer / other), own - 1)

    def _map_name(self, front: int, end: int, layer: int) -> str:
        paired = self._paired(front, end, layer)
        place = str(layer) if paired == layer else f"{paired}-{layer}"
        return f"stitches.{front}.{end}.{place}"

    def _tensor(self, anchor: int, name: str) -> Tensor:
        prefix = "anchors.0.model." if anchor == 0 else "model."
        return self._tensors[prefix + name]

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.pow(2).mean() + LARGE.norm_eps).sqrt() * gain

    def _rotate(self, heads: Tensor, position: int) -> Tensor:
        cosines, sines = self._cosines[position], self._sines[position]
        a, b = heads.chunk(2, dim=-1)
        return torch.cat((a * cosines - b * sines, b * cosines + a * sines), -1)

    def _stream_at(
        self,
        anchor: int,
        layer: int,
        token: int,
        read: Mapping[tuple[int, int], Tensor],
    ) -> Tensor:
        if (anchor, layer) in read:
            return read[anchor, layer]
        if layer == 0:
            return self._tensor(anchor, "embed_tokens.weight")[token]
        name = self._map_name(1 - anchor, anchor, layer)
        x = read[1 - anchor, self._paired(1 - anchor, anchor, layer)]
        return F.linear(x, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])

    def _attention(
        self,
        x: Tensor,
        anchor: int,
        layer: int,
        position: int,
        tokens: Sequence[int],
        read: Sequence[Mapping[tuple[int, int], Tensor]],
    ) -> Tensor:
        prefix, d = f"layers.{layer}.self_attn.", LARGE.head_dim
        gain = self._tensor(anchor, f"layers.{layer}.input_layernorm.weight")

        def project(kind: str, stream: Tensor) -> Tensor:
            weight = self._tensor(anchor, f"{prefix}{kind}_proj.weight")
            return (weight @ self._norm(stream, gain)).view(-1, d)

        q = self._rotate(project("q", x), position)
        keys, values = [], []
        for earlier in range(position + 1):
            stream = self._stream_at(anchor, layer, tokens[earlier], read[earlier])
            keys.append(self._rotate(project("k", stream), earlier))
            values.append(project("v", stream))
        group = len(q) // LARGE.kv_heads
        k = torch.stack(keys).repeat_interleave(group, dim=1)
        v = torch.stack(values).repeat_interleave(group, dim=1)
        weights = (torch.einsum("hd,thd->ht", q, k) / d**0.5).softmax(-1)
        mixed = torch.einsum("ht,thd->hd", weights, v).flatten()
        return self._tensor(anchor, f"{prefix}o_proj.weight") @ mixed

    def _mlp(self, x: Tensor, anchor: int, layer: int, *_: object) -> Tensor:
        prefix = f"layers.{layer}.mlp."
        normed = self._norm(
            x, self._tensor(anchor, f"layers.{layer}.post_attention_layernorm.weight")
        )
        gate, up, down = (
            self._tensor(anchor, f"{prefix}{kind}_proj.weight") for kind in ("gate", "up", "down")
        )
        return down @ (F.silu(gate @ normed) * (up @ normed))


class ThreadedSum:
    """A communicator of ranks that are threads of this process; sums are in float64."""

    def __init__(self, rank: int, shared: SharedSums) -> None:
        self.rank, self.ranks, self._shared, self._started = rank, shared.ranks, shared, 0

    def all_reduce_async(self, partial: Tensor) -> int:
        """Hand in a partial and return without waiting."""
        self._started += 1
        self._shared.put(self._started, self.rank, partial.clone())
        return self._started

    def wait(self, work: int) -> Tensor:
        """Return the sum of the partials of all ranks."""
        return self._shared.total(work)

    def close(self) -> None:
        """Do nothing."""


class SharedSums:
    """The partials that the ranks of a `ThreadedSum` have handed in."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._partials: dict[int, dict[int, Tensor]] = {}
        self._changed = threading.Condition()

    def put(self, number: int, rank: int, partial: Tensor) -> None:
        """Add the partial of a rank to reduction `number`."""
        with self._changed:
            self._partials.setdefault(number, {})[rank] = partial
            self._changed.notify_all()

    def total(self, number: int) -> Tensor:
        """Return the sum of a reduction when all ranks have handed in their partials."""
        with self._changed:
            complete = self._changed.wait_for(
                lambda: len(self._partials.get(number, {})) == self.ranks, timeout=60
            )
        assert complete, "a rank did not start the reduction"
        partials = self._partials[number]
        shapes = {tuple(partial.shape) for partial in partials.values()}
        assert len(shapes) == 1, f"ranks sent different shapes: {shapes}"
        return torch.stack([partials[rank] for rank in range(self.ranks)]).sum(0)


def run_ranks(ranks: int, run: Callable[[int, ThreadedSum], Tensor]) -> list[Tensor]:
    """Return the results of `run` on every rank, each in a thread of its own."""
    shared, results = SharedSums(ranks), {}
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = run(rank, ThreadedSum(rank, shared))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(ranks)]


def write_family(path: Path, family: DecoderFamily, variants: Sequence[TextVariant]) -> Path:
    """Write a bundle of a family with one token per byte and without qualities."""
    manifest = TextManifest(
        name="elastic",
        config=family.largest,
        anchors=family.anchors[:-1],
        paths=tuple(variants),
        end_tokens=(END,),
        origin="random weights",
        licence="Apache-2.0",
    )
    write_manifest(path, manifest)
    save_file(random_family(family=family), path / "model.safetensors")
    write_byte_tokenizer(path / "tokenizer.json")
    return path


def write_elastic(path: Path, residual: ResidualScheme = LADDER, positions: int = 128) -> Path:
    """Write a bundle of the family with one token per byte, and return its path.

    Qualities rise from 0.2 (small) by 0.1 to 0.6 (large); the ways back are worse than all others.
    """
    variants = paths(residual)
    longer = [a.model_copy(update={"max_positions": positions}) for a in FAMILY.anchors]
    write_family(path, DecoderFamily(tuple(longer)), variants)
    write_qualities(path, (0.2, 0.3, 0.4, 0.5, 0.6, 0.15, 0.14, 0.13))
    return path


def write_qualities(path: Path, values: Sequence[float]) -> None:
    """Write made-up qualities of the paths of a bundle."""
    qualities = {
        n: Quality(value=value, low=0.0, high=1.0, perplexity=10 - 10 * value)
        for n, value in enumerate(values)
    }
    table = made_up_quality(1).model_copy(update={"variants": qualities})
    (path / "quality.json").write_text(table.model_dump_json())
