"""Tests of incremental text, sampling, GGUF import, weight files and model configurations."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from ladderstitch.errors import BundleError, ConfigError, DataError
from ladderstitch.importers.gguf import import_gguf
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weight_reader import MemoryWeights, SafetensorsFolder
from ladderstitch.text.model.weights import check_weights
from ladderstitch.text.tokenizer import TextStream
from tests.support.language_models import TINY, one_rank_logits, random_tensors, write_tiny


def test_text_stream_with_multi_token_characters_keeps_text(
    tiny_language_bundle: TextBundle,
) -> None:
    tokenizer = tiny_language_bundle.tokenizer()
    text = "naïve 東京 🚲!"
    stream = TextStream(tokenizer)
    chunks = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(chunks) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in chunk for chunk in chunks)
    assert stream.finish() == ""


def write_gguf(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tiny model in llama.cpp's layout: its names, adjacent rotary pairs, F32."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(TINY.layers)
    writer.add_context_length(TINY.max_positions)
    writer.add_embedding_length(TINY.hidden_size)
    writer.add_feed_forward_length(TINY.intermediate_size)
    writer.add_head_count(TINY.heads)
    writer.add_head_count_kv(TINY.kv_heads)
    writer.add_layer_norm_rms_eps(TINY.norm_eps)
    writer.add_rope_freq_base(TINY.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([chr(0x100 + i) for i in range(TINY.vocab_size)])
    writer.add_token_types([3] + [1] * (TINY.vocab_size - 1))
    writer.add_token_merges([])
    writer.add_eos_token_id(0)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in tensors.items():
        parts = name.removeprefix("model.").removesuffix(".weight")
        theirs = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(parts)
        if theirs is None:
            _, layer, part = parts.split(".", 2)
            theirs = f"blk.{layer}.{names[part]}"
            heads = {"attn_q": TINY.heads, "attn_k": TINY.kv_heads}.get(names[part])
            if heads:  # (i, i + d/2) -> (2i, 2i + 1)
                d = TINY.head_dim
                tensor = tensor.view(heads, 2, d // 2, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(
            f"{theirs}.weight", tensor.contiguous().numpy(), raw_dtype=GGMLQuantizationType.F32
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_import_gives_identical_logits(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    write_gguf(tmp_path / "tiny.gguf", tensors)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "b", name="t", origin="test", licence="none")
    bundle = TextBundle.load(tmp_path / "b")
    assert bundle.manifest.config == TINY
    assert bundle.manifest.end_tokens == (0,)
    imported = load_file(bundle.path / "model.safetensors")
    got, wanted = (
        one_rank_logits(TINY, MemoryWeights(t), list(range(1, 20))) for t in (imported, tensors)
    )
    torch.testing.assert_close(got, wanted, atol=0, rtol=0)


def test_gguf_import_of_another_format_raises(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model at all, only some bytes")
    with pytest.raises(DataError, match=r"x.gguf: not a GGUF file"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "b", name="t", origin="o", licence="l")


def test_sharded_weights_are_found_by_their_index(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny")
    tensors = load_file(bundle / "model.safetensors")
    (bundle / "model.safetensors").unlink()
    files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, bundle / file)
    (bundle / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    weights = TextBundle.load(bundle).weights()
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name), tensor)
    name = "model.layers.0.self_attn.o_proj.weight"
    part = weights.read(name, rows=range(3, 9), columns=range(8, 16))
    assert torch.equal(part, tensors[name][3:9, 8:16])


def renamed(tensors: dict[str, torch.Tensor], style: str) -> dict[str, torch.Tensor]:
    """Return tensors with the names that other programs save them under."""
    changes: dict[str, Callable[[str], str]] = {
        "compiled": lambda name: f"_orig_mod.{name}",
        "compiled inside": lambda name: name.replace("model.", "model._orig_mod."),
        "parallel": lambda name: f"module._orig_mod.{name}",
        "without a head": lambda name: name.removeprefix("model."),
        "twice": lambda name: f"model.{name}" if name.startswith("model.") else name,
    }
    return {changes[style](name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "style", ["compiled", "compiled inside", "parallel", "without a head", "twice"]
)
def test_weights_with_other_names_are_the_same(
    tmp_path: Path, style: str, sharded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = write_tiny(tmp_path / "tiny")
    tensors = load_file(bundle / "model.safetensors")
    other = renamed(tensors, style)
    assert other.keys() != tensors.keys()
    save_file(other, bundle / "model.safetensors")
    if sharded:
        weight_map = {"weight_map": dict.fromkeys(other, "model.safetensors")}
        (bundle / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    with caplog.at_level(logging.INFO, "ladderstitch"):
        weights = TextBundle.load(bundle).weights()
    assert "by other names" in caplog.text
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name), tensor)


def write_tied(folder: Path, **names: str) -> Path:
    """Write a tiny bundle with a tied head; `names` rename tensors."""
    bundle = write_tiny(folder / "tiny")
    manifest = yaml.safe_load((bundle / "model.yaml").read_text())
    manifest["config"]["tied_head"] = True
    (bundle / "model.yaml").write_text(yaml.safe_dump(manifest))
    tensors = load_file(bundle / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file({names.get(k, k): t for k, t in tensors.items()}, bundle / "model.safetensors")
    return bundle


@pytest.mark.parametrize("name", ["lm_head.weight", "_orig_mod.lm_head.weight"])
def test_tied_weights_may_be_stored_as_the_head(tmp_path: Path, name: str) -> None:
    expected = TextBundle.load(write_tied(tmp_path / "a"))
    got = TextBundle.load(write_tied(tmp_path / "b", **{"model.embed_tokens.weight": name}))
    logits = [
        one_rank_logits(bundle.manifest.config, bundle.weights(), [1, 2, 3])
        for bundle in (expected, got)
    ]
    assert torch.equal(*logits)


def test_head_is_no_embedding_if_they_are_not_tied(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny")
    tensors = load_file(bundle / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, bundle / "model.safetensors")
    with pytest.raises(BundleError, match=r"missing model\.embed_tokens\.weight"):
        TextBundle.load(bundle)


def test_two_names_of_one_tensor_are_rejected(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny")
    tensors = load_file(bundle / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, bundle / "model.safetensors")
    with pytest.raises(BundleError, match=r"expected one tensor model\.norm\.weight"):
        TextBundle.load(bundle)


@pytest.mark.parametrize("num_more", [1, 50])
def test_tokenizer_may_have_more_tokens_than_the_model(
    tmp_path: Path, num_more: int, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny"))
    size = bundle.tokenizer().size
    assert caplog.text == ""
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<extra{number}>" for number in range(num_more)])
    tokenizer.save(str(bundle.path / "tokenizer.json"))
    larger = bundle.tokenizer()
    assert larger.size == size + num_more
    assert f"{larger.size} tokens, but the model has {size} rows" in caplog.text
    assert larger.encode("x<extra0>") == [*bundle.tokenizer().encode("x"), size]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "expected an object with weight_map"),
        ('{"weight_map": {"model.norm.weight": "../x"}}', "lies outside the folder"),
    ],
)
def test_weights_with_a_bad_index_raise(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BundleError, match=message):
        SafetensorsFolder(tmp_path).shape("model.norm.weight")


def test_check_weights_names_every_wrong_tensor() -> None:
    tensors = random_tensors(TINY)
    del tensors["model.norm.weight"]
    tensors["extra"] = torch.ones(1)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(2, 3)
    with pytest.raises(BundleError) as failure:
        check_weights(MemoryWeights(tensors), TINY)
    message = str(failure.value)
    assert "3 wrong tensors" in message
    assert "missing model.norm.weight" in message
    assert "unknown extra" in message
    assert "model.layers.1.mlp.up_proj.weight: expected (100, 48), got (2, 3)" in message


def test_with_paths_keeps_the_named_ones_and_their_qualities(tmp_path: Path) -> None:
    names = ("standard", "standard-int8", "ladder")
    paths = tuple(TextVariant(name=name, residual=ResidualScheme()) for name in names)
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny", paths=paths))
    kept = bundle.with_paths(["ladder", "standard"])
    assert [variant.name for variant in kept.manifest.variants] == ["standard", "ladder"]
    assert kept.quality is not None
    assert [kept.quality.value(n) for n in (0, 1)] == pytest.approx([0.6, 0.4])
    with pytest.raises(ConfigError, match=r"paths: expected some of .*, got \['int4'\]"):
        bundle.with_paths(["int4"])
