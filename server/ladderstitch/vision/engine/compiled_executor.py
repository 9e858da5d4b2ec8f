"""The networks of a family as sessions of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import onnxruntime

from ladderstitch.runtime.sessions import open_session
from ladderstitch.scheduling.requests import Logits, Pixels
from ladderstitch.vision.models.graphs import INPUT, OUTPUT, join_runs

Sessions = tuple[onnxruntime.InferenceSession, ...]


MIN_JOINED_BYTES = 96 << 20


MAX_JOINED_SHARE = 0.2
"""Memory of joined networks: this share of the family's weights, and at least 96 MiB."""


@dataclass(frozen=True, slots=True)
class CascadeParts:
    """The sessions of two routes: what both begin with, and what each runs after it."""

    shared: Sessions
    first: Sessions
    last: Sessions


class CompiledExecutor:
    """The networks of a family as sessions of ONNX Runtime.

    Every unit of the family has one session, so a network needs no memory of its own. `join` turns
    networks into one session each, which takes a tenth less time for small networks but has a copy
    of its weights. Calls may run concurrently in any threads; they hold no lock of the interpreter
    while they compute.
    """

    def __init__(self, routes: Mapping[int, Sequence[Path]], threads: int) -> None:
        """Open the sessions of all units, each computing on `threads` threads.

        `routes` has the files of each stitch's units in order, by the stitch's id.
        """
        self._routes, self._threads = routes, threads
        paths = {path for route in routes.values() for path in route}
        units = {path: open_session(str(path), threads) for path in paths}
        self._units: dict[Path, onnxruntime.InferenceSession] = units
        self._sessions: dict[int, Sessions] = {
            stitch: tuple(units[path] for path in route) for stitch, route in routes.items()
        }
        self._parts: dict[tuple[int, int], CascadeParts] = {}
        self.weight_bytes = sum(path.stat().st_size for path in paths)
        self._copies_left = max(MIN_JOINED_BYTES, MAX_JOINED_SHARE * self.weight_bytes)

    def __call__(self, images: Pixels, stitch: int) -> Logits:
        """Return float32 logits [B, K] of images [B, C, H, W] on a stitch.

        Raises `KeyError` for an id that the family does not have.
        """
        return _run(self._sessions[stitch], images)

    def run_first(self, images: Pixels, first: int, last: int) -> tuple[Logits, Pixels]:
        """Return the logits of the first variant of a cascade, and what `run_last` goes on with.

        That are the activations where the routes part, or the images if they share no unit.
        """
        parts = self._parts_of(first, last)
        if not parts.shared:
            return self(images, first), images
        kept = _run(parts.shared, images)
        return _run(parts.first, kept), kept

    def run_last(self, kept: Pixels, first: int, last: int) -> Logits:
        """Return the logits of the last variant; `kept` has rows of what `run_first` returned."""
        parts = self._parts_of(first, last)
        return _run(parts.last, kept) if parts.shared else self(kept, last)

    def num_shared(self, first: int, last: int) -> int:
        """Return the number of units that two routes begin with."""
        routes = zip(self._routes[first], self._routes[last], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], routes))

    def _parts_of(self, first: int, last: int) -> CascadeParts:
        """Return the parts of a cascade, unit by unit unless they have been joined."""
        if (first, last) not in self._parts:
            shared = self.num_shared(first, last)
            one, other = (
                tuple(self._units[path] for path in self._routes[variant])
                for variant in (first, last)
            )
            self._parts[first, last] = CascadeParts(one[:shared], one[shared:], other[shared:])
        return self._parts[first, last]

    def join_cascades(self, pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Join the parts of cascades, in this order, while the memory for copies lasts.

        Return which; a cascade without shared units runs whole networks and needs no parts.
        """
        left, joined = self._copies_left, []
        for first, last in pairs:
            shared = self.num_shared(first, last)
            one, other = self._routes[first], self._routes[last]
            left -= sum(path.stat().st_size for path in (*one, *other[shared:]))
            if not shared:
                continue
            if left < 0:
                break
            parts = (one[:shared], one[shared:], other[shared:])
            self._parts[first, last] = CascadeParts(*(self._open_joined(part) for part in parts))
            joined.append((first, last))
        return joined

    def open_whole(self, stitch: int) -> Callable[[Pixels], Logits]:
        """Return a function that runs a stitch as one graph with its own copy of the weights."""
        sessions = self._open_whole(stitch)
        return lambda images: _run(sessions, images)

    def join(self, stitches: Iterable[int]) -> list[int]:
        """Join the networks, in this order, while the memory for copies lasts; return which."""
        left = max(MIN_JOINED_BYTES, MAX_JOINED_SHARE * self.weight_bytes)
        joined: list[int] = []
        for stitch in stitches:
            left -= self.copied_bytes(stitch)
            if left < 0:
                break
            self._sessions[stitch] = self._open_whole(stitch)
            joined.append(stitch)
            self._copies_left = left
        return joined

    def copied_bytes(self, stitch: int) -> int:
        """Return the bytes of a stitch's weights, which its own session would copy."""
        return sum(path.stat().st_size for path in self._routes[stitch])

    def close(self) -> None:
        """Free the sessions now, although the garbage collector may not find this object soon."""
        self._sessions.clear()
        self._units.clear()
        self._parts.clear()

    def _open_whole(self, stitch: int) -> tuple[onnxruntime.InferenceSession, ...]:
        """Return one session, or a few if the units use different versions of operators."""
        return self._open_joined(self._routes[stitch])

    def _open_joined(self, paths: Sequence[Path]) -> Sessions:
        """Return sessions that run these units with their own copy of the weights."""
        graphs = join_runs(paths)
        return tuple(open_session(graph.SerializeToString(), self._threads) for graph in graphs)


def _run(sessions: Iterable[onnxruntime.InferenceSession], images: Pixels) -> Logits:
    """Return the logits of images that pass the sessions in order."""
    x = images
    for session in sessions:
        (x,) = session.run((OUTPUT,), {INPUT: x})
    return x
