"""What the paths of a model write to the cache, and what a change of path costs: pure data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.switches import SwitchTable


@dataclass(frozen=True, slots=True)
class CacheRules:
    """The relations between the paths of one model.

    Paths that differ in the precision of their matrices only are of one *kind*: their keys and
    values are interchangeable. A kind is the number of its first path.
    """

    kinds: tuple[int, ...]
    """The kind of each path."""
    num_missing: tuple[tuple[int, ...], ...]
    """By source and target path: planes that the source does not write and the target reads."""
    sharing: tuple[tuple[int, ...], ...]
    """By path: the other kinds that write some of its planes."""
    alternatives: tuple[frozenset[int], ...]
    """By path: those that may follow it within an answer, itself included."""
    switches: SwitchTable | None = None
    quality: QualityTable | None = None

    @classmethod
    def of(
        cls,
        config: RankConfig,
        switches: SwitchTable | None = None,
        quality: QualityTable | None = None,
    ) -> CacheRules:
        """Return the rules of a model.

        An answer may change between paths of one kind, between those whose change was measured,
        and between all paths of a family.
        """
        same, family = config.alternatives, config.family
        kinds = tuple(min(paths) for paths in same)
        planes = [set(family.planes(route)) for route in config.path_routes]
        everything = frozenset(range(len(kinds)))
        return cls(
            kinds,
            tuple(tuple(len(target - source) for target in planes) for source in planes),
            tuple(
                tuple(sorted({kinds[o] for o in everything if planes[o] & own} - {kind}))
                for kind, own in zip(kinds, planes, strict=True)
            ),
            tuple(
                everything
                if config.anchors
                else paths | (switches.targets(path) if switches else frozenset())
                for path, paths in enumerate(same)
            ),
            switches,
            quality,
        )

    @classmethod
    def separate(cls, num_paths: int) -> CacheRules:
        """Return the rules of paths that write the same planes, and that no answer combines."""
        nothing = ((0,) * num_paths,) * num_paths
        kinds = tuple(range(num_paths))
        others = tuple(tuple(sorted(set(kinds) - {kind})) for kind in kinds)
        return cls(kinds, nothing, others, tuple(frozenset({kind}) for kind in kinds))

    @property
    def translates(self) -> bool:
        """Whether some change of path leaves keys and values to be translated."""
        return any(map(any, self.num_missing))

    def other_kinds(self, path: int) -> list[int]:
        """Return all kinds but that of a path."""
        return sorted(set(self.kinds) - {self.kinds[path]})

    def penalty_nats(self, source: int, target: int) -> float | None:
        """Return the measured loss of quality of a change, nats per token; None: not measured."""
        if self.kinds[source] == self.kinds[target]:
            return 0.0
        return None if self.switches is None else self.switches.nats(source, target)

    def is_worthwhile(self, source: int, target: int) -> bool:
        """Return whether a change to a better path gains more nats per token than it costs.

        Without measured perplexities and penalties, it is taken to.
        """
        penalty, table = self.penalty_nats(source, target), self.quality
        if not penalty or table is None:
            return True
        before, after = (table.variants[path].perplexity for path in (source, target))
        return before is None or after is None or math.log(before / after) > penalty
