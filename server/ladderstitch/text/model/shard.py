"""The part of a model that one rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one of R ranks holds: heads, columns and vocabulary rows.

    `heads` are query heads. `kv_heads` lists the rank's key/value heads, each of which serves
    `len(heads) / len(kv_heads)` consecutive query heads.
    """

    rank: int
    ranks: int
    heads: range
    kv_heads: tuple[int, ...]
    ffn: tuple[range, ...]
    """Columns of the MLP: a part of each of the nested widths, so that all ranks have work."""
    vocabulary: range

    @classmethod
    def of(cls, config: DecoderConfig, rank: int, ranks: int) -> Shard:
        """Return the shard of one rank.

        With at most as many ranks as KV heads, each rank gets whole KV groups, if necessary an
        unequal number of them (9 query and 3 KV heads on 2 ranks: 2 + 1 groups). With more ranks,
        KV heads are replicated. Raises `ConfigError` if the heads cannot be split.
        """
        if not 0 <= rank < ranks:
            raise ConfigError(f"rank: expected 0 to {ranks - 1}, got {rank}")
        group = config.heads // config.kv_heads
        if ranks <= config.kv_heads:
            groups = _split(config.kv_heads, rank, ranks)
            heads = range(groups.start * group, groups.stop * group)
            kv_heads = tuple(groups)
        elif config.heads % ranks == 0:
            heads = _split(config.heads, rank, ranks)
            kv_heads = _replicate_kv_heads(heads, group)
        else:
            raise ConfigError(
                f"ranks: expected at most {config.kv_heads} (the KV heads) or a divisor of "
                f"{config.heads} (the query heads), got {ranks}"
            )
        rows = _split(config.vocab_size, rank, ranks)
        return cls(rank, ranks, heads, kv_heads, _split_ffn(config, rank, ranks), rows)

    @property
    def num_ffn_columns(self) -> int:
        """The number of columns of an MLP on this rank."""
        return sum(map(len, self.ffn))

    def num_first_columns(self, width: int) -> int:
        """Return how many of this rank's columns, its first ones, are below `width` of all."""
        return sum(len(part) for part in self.ffn if part.stop <= width)

    def owned_kv_heads(self, config: DecoderConfig) -> list[bool]:
        """Return of each head in `kv_heads` whether it counts here in a sum over all ranks.

        A head that is held several times counts where its first query head is.
        """
        served, group = len(self.heads) // len(self.kv_heads), config.heads // config.kv_heads
        return [
            self.heads.start + number * served == head * group
            for number, head in enumerate(self.kv_heads)
        ]


def _split(size: int, rank: int, ranks: int) -> range:
    """Return the rank's contiguous part of range(size); the first parts are larger by at most 1."""
    share, rest = divmod(size, ranks)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def _split_ffn(config: DecoderConfig, rank: int, ranks: int) -> tuple[range, ...]:
    """Return the rank's part of the columns between each nested width and the next one."""
    parts = []
    for begin, end in pairwise((0, *config.nested_ffn, config.intermediate_size)):
        part = _split(end - begin, rank, ranks)
        parts.append(range(begin + part.start, begin + part.stop))
    return tuple(parts)


def _replicate_kv_heads(heads: range, group: int) -> tuple[int, ...]:
    """Return one KV head per run of query heads that share it.

    If the runs have different lengths, return one KV head per query head.
    """
    serving = [head // group for head in heads]
    distinct = tuple(dict.fromkeys(serving))
    even = all(serving.count(kv) * len(distinct) == len(serving) for kv in distinct)
    return distinct if even else tuple(serving)
