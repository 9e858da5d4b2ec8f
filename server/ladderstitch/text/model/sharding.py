"""Which part of every tensor a rank holds: heads, feed-forward columns, vocabulary rows."""

from __future__ import annotations

from dataclasses import dataclass

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.config import LlamaConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank r's share of a model split over R ranks.

    `heads` are its query heads; `kv_heads` lists the key/value heads that it holds, each of which
    serves `len(heads) / len(kv_heads)` consecutive query heads.
    """

    rank: int
    ranks: int
    heads: range
    kv_heads: tuple[int, ...]
    ffn: range
    vocabulary: range

    @classmethod
    def of(cls, config: LlamaConfig, rank: int, ranks: int) -> Shard:
        """Raises `ConfigError` with the reason if the heads cannot be split so.

        Up to as many ranks as KV groups, whole groups are split, unevenly if need be (9 query and
        3 KV heads on 2 ranks: 2 + 1 groups). Beyond that, KV heads are replicated.
        """
        if not 0 <= rank < ranks:
            raise ConfigError(f"rank: expected 0 to {ranks - 1}, got {rank}")
        group = config.heads // config.kv_heads
        if ranks <= config.kv_heads:
            groups = _part(config.kv_heads, rank, ranks)
            heads = range(groups.start * group, groups.stop * group)
            kv_heads = tuple(groups)
        elif config.heads % ranks == 0:
            heads = _part(config.heads, rank, ranks)
            kv_heads = _replicated(heads, group)
        else:
            raise ConfigError(
                f"ranks: expected at most {config.kv_heads} (the KV heads) or a divisor of "
                f"{config.heads} (the query heads), got {ranks}"
            )
        ffn, vocabulary = (
            _part(size, rank, ranks) for size in (config.intermediate_size, config.vocab_size)
        )
        return cls(rank, ranks, heads, kv_heads, ffn, vocabulary)


def _part(size: int, rank: int, ranks: int) -> range:
    """Contiguous, in rank order; the first ranks get one more where it does not divide."""
    share, rest = divmod(size, ranks)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def _replicated(heads: range, group: int) -> tuple[int, ...]:
    """One KV head for each run of heads that share it; one a query head if runs are uneven."""
    serving = [head // group for head in heads]
    distinct = tuple(dict.fromkeys(serving))
    even = all(serving.count(kv) * len(distinct) == len(serving) for kv in distinct)
    return distinct if even else tuple(serving)
