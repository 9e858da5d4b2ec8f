"""Tests of nested MLPs and of ALiBi: slices are views, and equal models of their own.

Recorded outputs of MatFormer-OLMo are checked in `importers/test_verify_text.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ladderstitch.importers.verify_text import GoldenRun, run_case
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.manifest import TextManifest, TextVariant, write_manifest
from ladderstitch.text.messages import LogitsMode, dense_step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.mlp import NarrowMlp
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.text.model.weights import load_rank
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.training.text.calibrate import add_precision, open_runner
from tests.support.language_models import (
    TINY,
    made_up_quality,
    random_tensors,
    write_byte_tokenizer,
)

NESTED = TINY.model_copy(update={"nested_ffn": (13, 50), "tied_head": True})
TOKENS = torch.arange(1, 25)[None]
MIX = (13, 100, 50)
PATHS = tuple(
    TextVariant(name=name, residual=ResidualScheme(), ffn_widths=widths)
    for name, widths in (("whole", ()), ("half", (50,)), ("eighth", (13,)), ("mix", MIX))
)


def write_nested(path: Path, paths: tuple[TextVariant, ...] = PATHS) -> Path:
    """Write a bundle whose paths differ in the widths of their MLPs."""
    manifest = TextManifest(
        name="nested", config=NESTED, paths=paths, origin="random weights", licence="Apache-2.0"
    )
    write_manifest(path, manifest)
    save_file(random_tensors(NESTED), path / "model.safetensors")
    (path / "quality.json").write_text(made_up_quality(len(paths)).model_dump_json())
    write_byte_tokenizer(path / "tokenizer.json")
    return path


def cut_logits(width: int) -> Tensor:
    """Return the logits of a plain model whose MLPs have only the first columns."""
    cut = {
        name: tensor[:width]
        if name.endswith(("gate_proj.weight", "up_proj.weight"))
        else tensor[:, :width].contiguous()
        if name.endswith("down_proj.weight")
        else tensor
        for name, tensor in random_tensors(TINY).items()
    }
    config = TINY.model_copy(update={"intermediate_size": width})
    run = GoldenRun("whole", ResidualScheme(), (1,), incremental=False)
    return run_case(config, MemoryWeights(cut), TOKENS, run, 1, 9)


@pytest.mark.parametrize("ranks", [1, 2])
async def test_each_width_equals_a_model_of_that_width(tmp_path: Path, ranks: int) -> None:
    bundle = TextBundle.load(write_nested(tmp_path / "nested"))
    config = RankConfig.of(bundle, ranks=ranks, max_model_len=32)
    group = RankGroup(config, GroupOptions(link="tcp" if ranks > 1 else "auto"))
    try:
        await group.start()
        for path, width in enumerate((100, 50, 13)):
            got = await group.forward(TOKENS.numpy(), 0, path, last_only=False)
            expected = cut_logits(width).numpy()
            assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
    finally:
        await group.close()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_has_a_part_of_every_width(ranks: int) -> None:
    shards = [Shard.of(NESTED, rank, ranks) for rank in range(ranks)]
    for width in (13, 50, 100):
        counts = [shard.num_first_columns(width) for shard in shards]
        assert sum(counts) == width
        assert max(counts) - min(counts) <= 3  # one for each width


def test_paths_share_one_set_of_weights_and_slices_are_views(tmp_path: Path) -> None:
    bundle = TextBundle.load(write_nested(tmp_path / "nested"))
    runner = open_runner(bundle, 1)
    assert len(set(map(id, runner.models))) == 1
    model = runner.models[0]
    assert isinstance(model, Transformer)
    plain = load_rank(MemoryWeights(random_tensors(TINY)), TINY, Shard.of(TINY, 0, 1))
    assert model.weight_bytes == plain.bytes()
    for layer in model.layers:
        whole = {layer.mlp.output_matrix.untyped_storage().data_ptr()}
        for width in NESTED.nested_ffn:
            narrow = layer.mlp_of(width)
            assert isinstance(narrow, NarrowMlp)
            assert {narrow.down.untyped_storage().data_ptr()} == whole
            assert len({part.untyped_storage().data_ptr() for part, _ in narrow.parts}) == 1


def test_answers_may_change_between_all_widths_and_translate_nothing(tmp_path: Path) -> None:
    config = RankConfig.of(TextBundle.load(write_nested(tmp_path / "nested")), max_model_len=32)
    rules = CacheRules.of(config)
    everything = frozenset(range(len(PATHS)))
    assert rules.alternatives == (everything,) * len(PATHS)
    assert rules.kinds == (0,) * len(PATHS)
    assert not rules.translates
    assert rules.penalty_nats(0, 2) == 0.0


def test_a_change_of_width_keeps_the_keys_of_earlier_tokens(tmp_path: Path) -> None:
    """After tokens of the whole width, a narrow step reads their keys, as a reference does."""
    runner = open_runner(TextBundle.load(write_nested(tmp_path / "nested")), 1)
    prompt, token = TOKENS[0, :9], TOKENS[0, 9:10]
    runner.run(0, prompt, 0, LogitsMode.NONE)
    changed = runner.run(2, token, 9, LogitsMode.ALL)
    runner.run(2, prompt, 0, LogitsMode.NONE)
    narrow = runner.run(2, token, 9, LogitsMode.ALL)
    torch.testing.assert_close(narrow[0], cut_logits(13)[0, 9], atol=1e-4, rtol=1e-5)
    assert (changed - narrow).abs().max() > 0.01 * narrow.abs().max()


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((13, 100), r"ffn_widths: expected 1 or 3 widths, got 2"),
        ((14,), r"ffn_widths: expected widths of \[13, 50, 100\], got \[14\]"),
    ],
)
def test_widths_that_the_model_lacks_are_named(
    tmp_path: Path, widths: tuple[int, ...], message: str
) -> None:
    path = TextVariant(name="wrong", residual=ResidualScheme(), ffn_widths=widths)
    with pytest.raises(ValidationError, match=message):
        write_nested(tmp_path / "nested", (path,))


def test_low_bit_paths_have_all_columns(tmp_path: Path) -> None:
    path = PATHS[1].model_copy(update={"precision": "int8"})
    with pytest.raises(ValidationError, match="ffn_widths: expected none with a precision, got"):
        write_nested(tmp_path / "nested", (path,))


def test_quantised_forms_are_of_the_whole_path_only(tmp_path: Path) -> None:
    bundle = TextBundle.load(write_nested(tmp_path / "nested"))
    names = [variant.name for variant in add_precision(bundle, "int8").manifest.variants]
    assert names == ["whole", "half", "eighth", "mix", "whole-int8"]


@pytest.mark.parametrize("nested", [(0, 50), (50, 13), (100,), (50, 50)])
def test_nested_widths_ascend_below_the_whole(nested: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="nested_ffn: expected ascending widths from 1 to 99"):
        DecoderConfig.model_validate(TINY.model_dump() | {"nested_ffn": nested})


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (6, 1), (4, 4)])
def test_alibi_equals_scores_computed_in_float64(heads: int, kv_heads: int) -> None:
    """ONNX Runtime (float32) and torch (bfloat16), a chunk after a prefix, and single tokens."""
    config = TINY.model_copy(update={"heads": heads, "kv_heads": kv_heads, "alibi_bias_max": 8.0})
    generator, shard = torch.Generator().manual_seed(0), Shard.of(config, 0, 1)
    q, k, v = (
        torch.randn(20, count, config.head_dim, generator=generator).bfloat16().float()
        for count in (heads, kv_heads, kv_heads)
    )
    keys, values = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), keys) * config.head_dim**-0.5
    for head in range(heads):
        slope = 2.0 ** -(8.0 * (head + 1) / heads)
        for token in range(20):
            scores[head, token] -= slope * (token - torch.arange(20)).abs()
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = torch.einsum("hts,shd->thd", weights, values)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        cache, found = PagedCache(config, shard, 2, 16, dtype=dtype), []
        for start, end in ((0, 7), (7, 18), (18, 19), (19, 20)):
            step = dense_step(np.zeros((1, end - start), np.int64), start, 0, 2, LogitsMode.ALL)
            batch = Batch(step, 16)
            cache.append(1, batch, k[start:end], v[start:end])
            found.append(cache.attend(1, batch, q[start:end]))
        assert (torch.cat(found).double() - expected).abs().max() < tolerance


def test_alibi_rotates_nothing() -> None:
    """With one token, a model with ALiBi equals the same model at another position."""
    config = TINY.model_copy(update={"alibi_bias_max": 8.0})
    assert config.layer_rotations == ["none"] * config.layers
    shard, tensors = Shard.of(config, 0, 1), random_tensors(TINY)
    model = Transformer(config, load_rank(MemoryWeights(tensors), config, shard), shard)
    plans, comm = plan_layers(ResidualScheme(), 3, 1), SingleRankCommunicator()
    repeated = dense_step(np.full((1, 9), 5, np.int64), 0, 0, 1, LogitsMode.ALL)
    logits = model.forward(Batch(repeated, 16), PagedCache(config, shard, 1, 16), plans, comm)
    torch.testing.assert_close(logits[0], logits[8], atol=1e-4, rtol=1e-5)
