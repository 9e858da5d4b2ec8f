"""Tests of splitting a model over ranks: each part is held once, impossible splits raise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.errors import ConfigError
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig, create_comm_spec
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.shard import Shard


def config(heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=53,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=4,
        max_positions=16,
    )


@given(kv_heads=st.integers(1, 6), group=st.integers(1, 6), ranks=st.integers(1, 12))
def test_shards_hold_each_part_once_with_its_own_kv_heads(
    kv_heads: int, group: int, ranks: int
) -> None:
    whole = config(kv_heads * group, kv_heads)
    if ranks > kv_heads and whole.heads % ranks:
        with pytest.raises(ConfigError, match=f"ranks: expected at most {kv_heads} "):
            Shard.of(whole, 0, ranks)
        return
    shards = [Shard.of(whole, rank, ranks) for rank in range(ranks)]
    assert [head for shard in shards for head in shard.heads] == list(range(whole.heads))
    assert [row for shard in shards for row in shard.vocabulary] == list(range(101))
    assert [column for shard in shards for part in shard.ffn for column in part] == list(range(53))
    for shard in shards:
        per_kv, rest = divmod(len(shard.heads), len(shard.kv_heads))
        assert rest == 0
        assert [shard.kv_heads[i // per_kv] for i in range(len(shard.heads))] == [
            head // group for head in shard.heads
        ]
    counted = [
        head
        for shard in shards
        for head, counts in zip(shard.kv_heads, shard.owned_kv_heads(whole), strict=True)
        if counts
    ]
    assert counted == list(range(kv_heads))


def test_shard_with_uneven_groups_or_a_wrong_rank() -> None:
    assert [Shard.of(config(9, 3), rank, 2).kv_heads for rank in (0, 1)] == [(0, 1), (2,)]
    with pytest.raises(ConfigError, match="rank: expected 0 to 1, got 2"):
        Shard.of(config(9, 3), 2, 2)


def test_norms_over_all_heads_are_refused_on_a_link_of_one_width() -> None:
    model = config(6, 3).model_copy(update={"qk_norm": "all"})
    ranks = RankConfig(model=model, ranks=2, max_model_len=16)
    with pytest.raises(ConfigError, match="link: expected nccl, shared_memory or tcp"):
        create_comm_spec(ranks, GroupOptions(link="symmetric"), ())
