"""Tests of groups of layers: their reductions, their outputs on ranks, and groups that do not fit.

Recorded outputs of the definition are checked in `importers/test_verify_text.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.verify_text import run_ranks
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.comm.base import Communicator
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.messages import LogitsMode, dense_step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.residual import Groups, ResidualScheme, plan_layers
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.text.model.weights import load_rank
from ladderstitch.training.text.trainable_llama import TrainableLlama
from tests.support.language_models import TINY, random_tensors, write_tiny

PAIR = ResidualScheme(scheme="groups", groups=((1, 2),))
ONES = ResidualScheme(scheme="groups", groups=((0, 1), (2, 1)))
DEEP = TINY.model_copy(update={"layers": 30})  # as many layers as SmolLM2-135M
TOKENS = torch.arange(1, 25)[None]


class CountingCommunicator:
    """A communicator that counts the reductions of another."""

    def __init__(self, comm: Communicator) -> None:
        self.rank, self.ranks, self.reductions = comm.rank, comm.ranks, 0
        self._comm = comm

    def all_reduce_async(self, partial: Tensor) -> object:
        self.reductions += 1
        return self._comm.all_reduce_async(partial)

    def wait(self, work: object) -> Tensor:
        return self._comm.wait(work)

    def close(self) -> None:
        self._comm.close()


def decode_one_token(residual: ResidualScheme) -> tuple[Tensor, int]:
    """Return the logits of a token on 2 ranks of the deep model, and one rank's reductions."""
    weights, plans = MemoryWeights(random_tensors(DEEP)), plan_layers(residual, DEEP.layers, 2)

    def work(comm: Communicator) -> tuple[Tensor, int]:
        counting, shard = CountingCommunicator(comm), Shard.of(DEEP, comm.rank, 2)
        model = Transformer(DEEP, load_rank(weights, DEEP, shard), shard)
        step = dense_step(np.array([[7]]), 0, 0, 1, LogitsMode.ALL)
        cache = PagedCache(DEEP, shard, 1, 16)
        logits = model.forward(Batch(step, 16), cache, plans, counting)
        return logits, counting.reductions

    results = run_ranks(2, work)
    assert len({count for _, count in results}) == 1
    return torch.cat([logits for logits, _ in results], dim=-1), results[0][1]


@pytest.mark.parametrize(
    ("groups", "saved"),
    [
        ((), 0),
        (((4, 1), (9, 1)), 0),
        (tuple((first, 2) for first in range(10, 20, 2)), 2 * 5),
        (tuple((first, 2) for first in range(0, 30, 2)), 2 * 15),
        (((12, 3), (20, 4)), 2 * (2 + 3)),
    ],
)
def test_a_group_has_two_reductions(groups: Groups, saved: int) -> None:
    """30 layers have 60 reductions and that of the embedding; a pair saves 2 of them."""
    standard, count = decode_one_token(ResidualScheme())
    assert count == 60 + 1
    grouped, count = decode_one_token(ResidualScheme(scheme="groups", groups=groups))
    assert count == 60 - saved + 1
    assert torch.equal(grouped, standard) == (saved == 0)


@pytest.mark.parametrize("ranks", [1, 2])
async def test_ranks_compute_groups_in_one_pass_and_token_by_token(
    tmp_path: Path, ranks: int
) -> None:
    """The standard path, groups of one and a pair share weights and the cache's shape."""
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny"))
    schemes = (ResidualScheme(), ONES, PAIR)
    config = RankConfig.of(bundle, paths=schemes, ranks=ranks, max_model_len=32)
    trainable, found = TrainableLlama(TINY, random_tensors(TINY)), []
    group = RankGroup(config, GroupOptions(link="tcp" if ranks > 1 else "auto"))
    try:
        await group.start()
        for path, scheme in enumerate(schemes):
            whole = (await group.forward(TOKENS.numpy(), 0, path, last_only=False)).copy()
            await group.forward(TOKENS[:, :9].numpy(), 0, path)
            tail = [
                (await group.forward(TOKENS[:, at : at + 1].numpy(), at, path)).copy()
                for at in range(9, TOKENS.shape[1])
            ]
            with torch.inference_mode():
                plans = plan_layers(scheme, TINY.layers, 1)
                expected = trainable.logits(TOKENS, plans).numpy()
            largest = np.abs(expected).max()
            assert np.abs(whole - expected).max() < 1e-5 * largest
            assert np.abs(np.stack(tail, 1).reshape(1, -1, 257) - expected[:, 9:]).max() < (
                1e-5 * largest
            )
            found.append(whole)
    finally:
        await group.close()
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.1 * np.abs(found[0]).max()


@pytest.mark.parametrize(
    "groups", [((2, 2),), ((0, 2), (1, 1)), ((1, 0),), ((3, 1),), ((-1, 2),), ((1, 2), (0, 2))]
)
def test_groups_that_do_not_fit_are_named(tmp_path: Path, groups: Groups) -> None:
    residual = ResidualScheme(scheme="groups", groups=groups)
    message = r"groups: expected groups of at least 1 of layers 0 to 2 that do not overlap, got \["
    with pytest.raises(ConfigError, match=message):
        plan_layers(residual, TINY.layers, 1)
    with pytest.raises(ValidationError, match=message):
        write_tiny(tmp_path / "tiny", residual)


def test_groups_and_scheme_must_agree() -> None:
    with pytest.raises(ValidationError, match="groups: expected the first layer and size of each"):
        ResidualScheme(scheme="groups")
    with pytest.raises(ValidationError, match="groups: expected none with the scheme ladder"):
        ResidualScheme(scheme="ladder", groups=((0, 2),))


def test_a_bundle_with_norms_of_outputs_has_no_groups(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny", paths=(TextVariant(name="pair", residual=PAIR),))
    assert TextBundle.load(path).manifest.variants[0].residual.groups == ((1, 2),)
    manifest = yaml.safe_load((path / "model.yaml").read_text())
    manifest["config"]["norm_place"] = "after"
    (path / "model.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(BundleError, match="residual: expected standard, as norms of outputs"):
        TextBundle.load(path)
