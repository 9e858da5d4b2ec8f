"""Test of ranks on two hosts (network namespaces): the same logits as one rank on one host."""

from __future__ import annotations

import numpy as np
import pytest

from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch_loadtest.benchmarks.two_hosts import HERE, AlternatingLauncher, second_host

PROMPT = np.arange(1, 30, dtype=np.int64)[None]


async def logits(group: RankGroup) -> np.ndarray:
    try:
        await group.start()
        return await group.forward(PROMPT, 0, last_only=False)
    finally:
        await group.close()


async def test_ranks_on_two_hosts_give_the_logits_of_one(tiny_language_bundle: TextBundle) -> None:
    alone = await logits(RankGroup(RankConfig.of(tiny_language_bundle, max_model_len=64)))
    rank_config = RankConfig.of(tiny_language_bundle, max_model_len=64, ranks=2)
    try:
        with second_host() as namespace:
            options = GroupOptions(link="tcp", listen=f"{HERE}:0")
            distributed = await logits(
                RankGroup(rank_config, options, AlternatingLauncher(namespace))
            )
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert np.abs(distributed - alone).max() <= 1e-5 * np.abs(alone).max()
