"""Tests of GGUF import: values of every type, requantised errors, tokenizers and rejected files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFEndian, GGUFReader, GGUFWriter
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ladderstitch.errors import BundleError, DataError, UserError
from ladderstitch.importers.gguf import import_gguf
from ladderstitch.importers.gguf_tokenizers import SPLITS, build_tokenizer
from ladderstitch.runtime.low_bit import quantise
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.tokenizer import TextStream, TextTokenizer
from tests.support.language_models import one_rank_logits

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 64  # K types take multiples of 256 columns
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<unk>", "<s>", "</s>", "<|tool|>", *ALPHABET, "ab", "abc"]
TYPES = [2, 3, 3, 4] + [1] * (len(ALPHABET) + 2)
FIELDS: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": WIDTH,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10_000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.eos_token_id": 2,
}
SHAPES = {
    "token_embd.weight": (len(TOKENS), WIDTH),
    "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, WIDTH),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, WIDTH),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, HEADS * HEAD_DIM),
    "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.ffn_gate.weight": (WIDTH, WIDTH),
    "blk.0.ffn_up.weight": (WIDTH, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, WIDTH),
}
HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
FOUR_BITS = (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K)
OTHERS = (Kind.Q5_0, Kind.Q5_1, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0)
KINDS = (*FLOATS, *FOUR_BITS, *OTHERS)


def pack_k_scales(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Return the 12 bytes per block with 8 scales and 8 minima of 6 bits, as in Q4_K and Q5_K."""
    packed = np.zeros((len(scales), 12), np.uint8)
    packed[:, 0:4] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    packed[:, 4:8] = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    packed[:, 8:12] = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return packed


def random_blocks(shape: tuple[int, ...], kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Return rows of random blocks of a K type, whose ranges contain 0 as those of weights do.

    A weight of Q4_K and Q5_K is d s q - e m with codes q, 6-bit scales s and minima m per 32
    weights, and d and e per 256. With Q6_K it is d s q, with 8-bit scales s per 16 weights.
    """
    count = shape[0] * shape[1] // 256
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (count, size), np.uint8)

    def halves(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1)).astype(np.float16)

    if kind == Kind.Q6_K:
        blocks[:, -2:] = halves(1e-5, 2e-5).view(np.uint8)
    else:
        middle = 8 if kind == Kind.Q4_K else 16  # e m is about half of the range of d s q
        factor = halves(1e-4, 2e-4)
        scales = rng.integers(20, 64, (count, 8)).astype(np.uint8)
        minima = scales - rng.integers(0, 8, (count, 8)).astype(np.uint8)
        blocks[:, 0:2] = factor.view(np.uint8)
        blocks[:, 2:4] = (factor * np.float16(middle)).view(np.uint8)
        blocks[:, 4:16] = pack_k_scales(scales, minima)
    return blocks.reshape(shape[0], -1)


def make_tensors(kind: Kind, *, seed: int = 0) -> dict[str, tuple[np.ndarray, Kind]]:
    """Return the stored bytes and the type of every tensor; norms have F32."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in SHAPES.items():
        values = (rng.standard_normal(shape) * 0.05).astype(np.float32)
        if len(shape) == 1:
            made[name] = (1 + values, Kind.F32)
        elif kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
            made[name] = (random_blocks(shape, kind, rng), kind)
        else:
            made[name] = (gguf.quants.quantize(values, kind), kind)
    return made


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, Kind]],
    changes: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    order: GGUFEndian = GGUFEndian.LITTLE if sys.byteorder == "little" else GGUFEndian.BIG,
) -> Path:
    """Write a file with `FIELDS`, some of which are changed, or left out if they are None."""
    writer = GGUFWriter(path, architecture, endianess=order)
    for name, value in (FIELDS | dict(changes or {})).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def import_to(bundle: Path, file: Path) -> dict[str, torch.Tensor]:
    """Import a file and return the tensors of the bundle, which is loaded once."""
    import_gguf(file, bundle, name="t", origin="test", licence="none")
    return load_file(TextBundle.load(bundle).path / "model.safetensors")


def expected_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return gguf's values by their Hugging Face names, with the rows of q and k in HF's order.

    llama.cpp rotates rows 2 i and 2 i + 1 of a head, Hugging Face rows i and i + d/2.
    """
    expected = {}
    for tensor in GGUFReader(file).tensors:
        stem = tensor.name.removesuffix(".weight")
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
        if stem in ("blk.0.attn_q", "blk.0.attn_k"):
            source = values.copy()
            for head in range(len(values) // HEAD_DIM):
                for pair in range(HEAD_DIM // 2):
                    for half in (0, 1):
                        row = head * HEAD_DIM
                        to = row + half * HEAD_DIM // 2 + pair
                        values[to] = source[row + 2 * pair + half]
        expected[f"{HF_NAMES[stem]}.weight"] = torch.from_numpy(values)
    return expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_import_keeps_the_exact_values_of_every_type(tmp_path: Path, kind: Kind) -> None:
    file = write_gguf(tmp_path / "x.gguf", make_tensors(kind))
    imported, expected = import_to(tmp_path / "b", file), expected_tensors(file)
    assert imported.keys() == expected.keys()
    for name, values in expected.items():
        assert imported[name].dtype == torch.float32
        assert torch.equal(imported[name], values), name


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q6_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: Kind, tied: bool) -> None:
    tensors = make_tensors(kind)
    if not tied:
        tensors["output.weight"] = make_tensors(kind, seed=1)["token_embd.weight"]
    file = write_gguf(tmp_path / "x.gguf", tensors, {"llama.vocab_size": len(TOKENS)})
    import_to(tmp_path / "b", file)
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    compare_logits(TextBundle.load(tmp_path / "b"), other)


def compare_logits(bundle: TextBundle, other: Any) -> None:
    """Compare the logits of 60 tokens with those of a model of transformers."""
    tokens = [(7 * i + 11) % len(TOKENS) for i in range(60)]
    ours = one_rank_logits(bundle.manifest.config, bundle.weights(), tokens)
    with torch.inference_mode():
        theirs = other(torch.tensor([tokens])).logits[0]
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def ranges(weights: torch.Tensor) -> torch.Tensor:
    """Return the range of each block of 32 weights, 0 included: [N, K / 32]."""
    blocks = weights.reshape(len(weights), -1, 32)
    return blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)


def matrices(tmp_path: Path, kind: Kind) -> list[torch.Tensor]:
    """Return the imported matrices of a file of this type."""
    tensors = import_to(tmp_path / "b", write_gguf(tmp_path / "x.gguf", make_tensors(kind)))
    return [tensor for tensor in tensors.values() if tensor.ndim == 2]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_int8_error_is_at_most_half_a_step(tmp_path: Path, kind: Kind) -> None:
    for weights in matrices(tmp_path, kind):
        error = (quantise(weights, 8).dequantise() - weights).abs()
        half_step = ranges(weights) / 255 / 2
        assert (error.reshape(len(weights), -1, 32).amax(-1) <= half_step * 1.001).all()


@pytest.mark.parametrize("kind", [*FLOATS, *OTHERS], ids=lambda kind: kind.name)
def test_int4_error_of_other_types_is_bounded(tmp_path: Path, kind: Kind) -> None:
    """Check bounds for ranges that are cut by up to 20 % where that lowers the squared error.

    The uncut range errs by at most half a step everywhere, so that the root mean square of the best
    one is at most that. A cut weight errs by at most 20 % of its size, and by half a step.
    """
    for weights in matrices(tmp_path, kind):
        blocks = weights.reshape(len(weights), -1, 32)
        error = (quantise(weights, 4).dequantise() - weights).reshape(blocks.shape)
        half_step = ranges(weights) / 15 / 2
        assert (error.square().mean(-1).sqrt() <= half_step * 1.001).all()
        cut = 0.2 * blocks.abs().amax(-1)
        assert (error.abs().amax(-1) <= (cut + half_step) * 1.001).all()


@pytest.mark.parametrize(
    ("kind", "bound"),
    [(Kind.Q4_0, 1e-6), (Kind.Q4_1, 1 / 30), (Kind.Q4_K, 1 / 30)],
    ids=lambda value: getattr(value, "name", None),
)
def test_int4_keeps_weights_of_4_bit_types(tmp_path: Path, kind: Kind, bound: float) -> None:
    """Check errors in steps of the coarsest of the 32 blocks whose offsets share a scale.

    The offset of a block whose range contains 0 is at most half a step, so that those of 32 blocks
    have a range of one step, and are kept to 1/30 of it.
    """
    for weights in matrices(tmp_path, kind):
        matrix = quantise(weights, 4)
        assert matrix.has_offsets == (kind != Kind.Q4_0)
        blocks = weights.reshape(len(weights), -1, 32)
        # ranges of up to 1024 weights, here of a whole row
        steps = ((blocks.amax(-1) - blocks.amin(-1)) / 15).amax(-1)
        error = (matrix.dequantise() - weights).abs().amax(-1)
        assert (error <= bound * steps * 1.1).all()  # some blocks do not use all 16 codes


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_become_its_scaling(tmp_path: Path, factor: float) -> None:
    base = 500_000.0
    frequencies = base ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    wavelengths = 2 * np.pi / frequencies
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors[wavelengths < 8192 / 4] = 1
    factors[wavelengths > 8192] = factor
    tensors = make_tensors(Kind.F32)
    tensors["rope_freqs.weight"] = (factors.astype(np.float32), Kind.F32)
    file = write_gguf(tmp_path / "x.gguf", tensors, {"llama.rope.freq_base": base})
    weights = import_to(tmp_path / "b", file)
    scaling = {"rope_type": "llama3", "factor": factor, "rope_theta": base}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    compare_logits(
        TextBundle.load(tmp_path / "b"),
        transformers_model(weights, scaling | {"original_max_position_embeddings": 8192}),
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
    ids=["new field", "old field"],
)
def test_linear_rope_scaling_is_kept(tmp_path: Path, fields: dict[str, Any]) -> None:
    file = write_gguf(tmp_path / "x.gguf", make_tensors(Kind.F32), fields)
    weights = import_to(tmp_path / "b", file)
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    compare_logits(TextBundle.load(tmp_path / "b"), transformers_model(weights, scaling))


def transformers_model(weights: Mapping[str, torch.Tensor], rope: dict[str, Any]) -> Any:
    """Return transformers' Llama with these weights and rotary parameters."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=8192 * 16,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(dict(weights) | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type: expected none or .* 'yarn'"),
        ({"llama.rope.scaling.attn_factor": 0.5}, r"rope\.scaling\.attn_factor: .* got 0\.5"),
        ({"llama.rope.dimension_count": 32}, r"rope\.dimension_count: expected 64, got 32"),
        ({"llama.attention.value_length": 32}, r"value_length: expected 64, got 32"),
        ({"llama.attention.sliding_window": 16}, r"sliding_window: expected none, got 16"),
        ({"llama.expert_count": 8}, r"llama\.expert_count: expected none, got 8"),
        ({"llama.block_count": None}, r"block_count: expected a positive int, got none"),
        ({"llama.block_count": 10**6}, r"block_count: expected at most 11, got 1000000"),
        ({"llama.attention.head_count": 0}, r"head_count: expected a positive int, got 0"),
        ({"llama.attention.head_count_kv": 3}, r"kv_heads: expected a divisor of 4, got 3"),
        ({"llama.feed_forward_length": [1, 2]}, r"feed_forward_length: .*int, got \[1, 2\]"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, r"rms_epsilon: .*float, got none"),
        ({"llama.rope.freq_base": "high"}, r"freq_base: expected a positive float, got 'high'"),
        ({"split.count": 2}, r"split\.count: expected 1, got 2"),
        ({"tokenizer.ggml.model": None}, r"ggml\.model: .*'gpt2', 'llama'\], got None"),
        ({"tokenizer.ggml.model": "bert"}, r"ggml\.model: .*got 'bert'"),
        ({"tokenizer.ggml.pre": "tekken"}, r"ggml\.pre: .*got 'tekken'"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, r"ggml\.pre: .*got 'deepseek-llm'"),
        ({"tokenizer.ggml.tokens": None}, r"ggml\.tokens: expected a list .*got none"),
        ({"tokenizer.ggml.tokens": ["a"] * 3}, r"ggml\.tokens: .* got 'a' twice"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"ggml\.tokens: expected a list of .*got \[1, 2\]"),
        ({"tokenizer.ggml.token_type": [1, 3]}, rf"token_type: expected {len(TOKENS)} .*got 2"),
        ({"tokenizer.ggml.merges": ["a", "b c"]}, r"merges: expected pairs of tokens"),
        ({"tokenizer.ggml.merges": ["q z"]}, r"merges: expected pairs of tokens, .*'q', 'z'"),
        ({"tokenizer.ggml.merges": None}, r"merges: expected merges for 'ab', got none"),
        ({"tokenizer.ggml.eos_token_id": None}, r"eos_token_id: expected a token id, got none"),
        ({"tokenizer.ggml.eos_token_id": 999}, r"eos_token_id: expected 0 to \d+, got 999"),
        ({"tokenizer.ggml.add_bos_token": True}, r"bos_token_id: expected a token id, got none"),
        ({"tokenizer.ggml.add_eos_token": True}, r"add_eos_token: expected none, got True"),
        ({"tokenizer.chat_template": 5}, r"chat_template"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_that_do_not_fit_raise(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write_gguf(tmp_path / "x.gguf", make_tensors(Kind.Q4_0), changes)
    with pytest.raises(DataError, match=rf"x\.gguf: (?s:.*){message}"):
        import_to(tmp_path / "b", file)
    assert not (tmp_path / "b").exists()


def test_file_of_another_architecture_raises(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", make_tensors(Kind.Q4_0), architecture="qwen2")
    with pytest.raises(DataError, match=r"general.architecture: expected 'llama', got 'qwen2'"):
        import_to(tmp_path / "b", file)


def test_file_of_the_other_byte_order_raises(tmp_path: Path) -> None:
    other = GGUFEndian.BIG if sys.byteorder == "little" else GGUFEndian.LITTLE
    file = write_gguf(tmp_path / "x.gguf", make_tensors(Kind.F32), order=other)
    with pytest.raises(DataError, match=r"x.gguf: byte order: expected that of this machine"):
        import_to(tmp_path / "b", file)


def test_wrong_tensors_raise_naming_all_of_them(tmp_path: Path) -> None:
    tensors = make_tensors(Kind.F32)
    del tensors["blk.0.attn_norm.weight"]
    tensors["blk.0.attn_q.weight"] = (np.zeros((32, WIDTH), np.float32), Kind.F32)
    tensors["blk.0.attn_q.bias"] = (np.zeros(256, np.float32), Kind.F32)
    with pytest.raises(BundleError) as failure:
        import_to(tmp_path / "b", write_gguf(tmp_path / "x.gguf", tensors))
    message = str(failure.value)
    assert "x.gguf: 3 wrong tensors" in message
    assert "missing blk.0.attn_norm.weight" in message
    assert "unknown blk.0.attn_q.bias" in message
    assert "blk.0.attn_q.weight: expected (256, 256), got (32, 256)" in message


@pytest.mark.parametrize("kind", [Kind.F64, Kind.I8, Kind.Q8_K], ids=lambda kind: kind.name)
def test_type_that_cannot_be_dequantised_raises(tmp_path: Path, kind: Kind) -> None:
    tensors = make_tensors(Kind.F32)
    rows, columns = SHAPES["blk.0.ffn_up.weight"]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((rows, columns // block * size), np.uint8)
    if kind != Kind.Q8_K:
        data = np.zeros((rows, columns), {Kind.F64: np.float64, Kind.I8: np.int8}[kind])
    tensors["blk.0.ffn_up.weight"] = (data, kind)
    file = write_gguf(tmp_path / "x.gguf", tensors)
    with pytest.raises(DataError, match=rf"x.gguf: blk.0.ffn_up.weight: type: .* {kind.name}"):
        import_to(tmp_path / "b", file)


def test_values_that_are_not_finite_raise(tmp_path: Path) -> None:
    tensors = make_tensors(Kind.F32)
    tensors["blk.0.ffn_up.weight"][0][3, 4] = np.nan
    with pytest.raises(DataError, match=r"x.gguf: blk.0.ffn_up.weight: expected finite"):
        import_to(tmp_path / "b", write_gguf(tmp_path / "x.gguf", tensors))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.full(32, 3, np.float32), "expected the factors of Llama 3.1, got others"),
        (np.ones(5, np.float32), r"expected \(32,\), got \(5,\)"),
    ],
    ids=["others", "shape"],
)
def test_other_rope_factors_raise(tmp_path: Path, factors: np.ndarray, message: str) -> None:
    tensors = make_tensors(Kind.F32) | {"rope_freqs.weight": (factors, Kind.F32)}
    with pytest.raises(DataError, match=rf"rope_freqs.weight: {message}"):
        import_to(tmp_path / "b", write_gguf(tmp_path / "x.gguf", tensors))


def test_rope_factors_with_linear_scaling_raise(tmp_path: Path) -> None:
    tensors = make_tensors(Kind.F32) | {"rope_freqs.weight": (np.ones(32, np.float32), Kind.F32)}
    file = write_gguf(tmp_path / "x.gguf", tensors, {"llama.rope.scaling.factor": 2.0})
    with pytest.raises(DataError, match=r"rope.scaling: expected none with rope_freqs.weight"):
        import_to(tmp_path / "b", file)


def test_truncated_file_raises_at_any_length(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "x.gguf", make_tensors(Kind.Q4_0)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 2000, 97), *np.linspace(2000, len(whole) - 1, 20).astype(int)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut.gguf: not a GGUF file, or damaged"):
            import_to(tmp_path / "b", cut)


def test_huge_length_of_a_list_raises_without_reading_it(tmp_path: Path) -> None:
    data = bytearray(write_gguf(tmp_path / "x.gguf", make_tensors(Kind.Q4_0)).read_bytes())
    field = b"tokenizer.ggml.token_type"
    length = data.index(field) + len(field) + 8  # after the types of the field and its items
    assert int.from_bytes(data[length : length + 8], sys.byteorder) == len(TOKENS)
    data[length + 5] = 1  # 2**40 more
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(DataError, match=r"x.gguf: not a GGUF file, or damaged: expected more"):
        import_to(tmp_path / "b", tmp_path / "x.gguf")


def test_damaged_file_raises_only_user_errors(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "x.gguf", make_tensors(Kind.Q4_0)).read_bytes())
    rng = np.random.default_rng(0)
    header = whole.index(b"blk.0.ffn_down.weight") + 60
    damaged, messages = tmp_path / "damaged.gguf", []
    for _ in range(60):
        data = bytearray(whole)
        for position in rng.integers(0, header, 3):
            data[position] = rng.integers(0, 256)
        damaged.write_bytes(data)
        try:
            import_gguf(damaged, tmp_path / "b", name="t", origin="test", licence="none")
        except UserError as error:  # an error of any other type fails the test
            messages.append(str(error))
    assert messages
    assert all("damaged.gguf: " in message for message in messages)


ORACLE = json.loads((Path(__file__).parent / "gguf_tokens.json").read_text())
"""Tokens of llama.cpp for texts and vocabularies; its field `about` says how it was made."""
SPECIAL, SPECIAL_TYPES = ["<unk>", "<s>", "</s>", "<|pad|>"], [2, 3, 3, 4]
ROLES = {"bos": 1, "eos": 2}


def byte_level_fields(pre: str) -> dict[str, Any]:
    """Return the fields of the oracle's byte-level tokenizer."""
    products = dict.fromkeys(merge.replace(" ", "") for merge in ORACLE["merges"])
    tokens = [*SPECIAL, *ALPHABET, *products, *ORACLE["whole"]]
    return tokenizer_fields("gpt2", tokens, SPECIAL_TYPES) | {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": ORACLE["merges"],
    }


def sentencepiece_fields(name: str = "spm") -> dict[str, Any]:
    """Return the fields of the oracle's SentencePiece tokenizer, or of one of its variants."""
    ordinary = [*ORACLE["pieces"], *ORACLE["characters"]]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *ordinary]
    scores = [0.0] * 260 + [-float(i) for i in range(len(ordinary))]
    flags = {"spm-no-prefix": "add_space_prefix", "spm-no-bos": "add_bos_token"}
    fields = tokenizer_fields("llama", tokens, SPECIAL_TYPES + [6] * 256)
    if name in flags:
        fields[f"tokenizer.ggml.{flags[name]}"] = False
    return fields | {"tokenizer.ggml.scores": scores}


def tokenizer_fields(model: str, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Return the fields that all tokenizers have; tokens without a type are normal ones."""
    types = types + [1] * (len(tokens) - len(types))
    fields = {"model": model, "tokens": tokens, "token_type": types}
    fields |= {f"{role}_token_id": number for role, number in ROLES.items()}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


EXPECTED = {name: group["tokens"] for group in ORACLE["expected"] for name in group["names"]}


def test_oracle_covers_every_tokenizer_and_tells_them_apart() -> None:
    assert EXPECTED.keys() == {*SPLITS, "spm", "spm-no-prefix", "spm-no-bos"}
    assert len(ORACLE["texts"]) >= 50
    for group in ORACLE["expected"]:
        assert len(group["tokens"]) == len(ORACLE["texts"])
    answers = [json.dumps(group["tokens"]) for group in ORACLE["expected"]]
    assert len(set(answers)) == len(answers) == 9


@pytest.mark.parametrize("name", EXPECTED)
def test_tokens_equal_those_of_llama_cpp(name: str) -> None:
    fields = byte_level_fields(name) if name in SPLITS else sentencepiece_fields(name)
    tokenizer = build_tokenizer(fields)
    for text, expected in zip(ORACLE["texts"], EXPECTED[name], strict=True):
        assert tokenizer.encode(text).ids == expected, text


@pytest.mark.parametrize("name", EXPECTED)
def test_answers_keep_text_and_user_defined_tokens(name: str) -> None:
    fields = byte_level_fields(name) if name in SPLITS else sentencepiece_fields(name)
    tokenizer = TextTokenizer(build_tokenizer(fields))
    text = " naïve 東京 🚲👩‍👩‍👧‍👦<|pad|>\n\x01 </s>end"
    tokens, stream = tokenizer.encode(text), TextStream(tokenizer)
    streamed = "".join(stream.add(token) for token in tokens) + stream.finish()
    assert streamed == tokenizer.decode(tokens)
    if name in ("spm", "spm-no-bos"):  # spaces that come before a text and after special tokens
        assert streamed == "  naïve 東京 🚲👩‍👩‍👧‍👦<|pad|> \n\x01  end"
    else:
        assert streamed == text.replace("</s>", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0] * 3}, r"scores: expected \d+ scores, got 3"),
        ({"scores": ["high"]}, r"scores: expected a list"),
        ({"scores": None}, r"scores: expected \d+ scores, got 0"),
        ({"remove_extra_whitespaces": True}, r"remove_extra_whitespaces: expected none"),
        ({"precompiled_charsmap": [1, 2]}, r"precompiled_charsmap: expected none"),
        ({"bos_token_id": -1}, r"bos_token_id: expected 0 to \d+, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sentencepiece_fields_that_do_not_fit_raise(changes: dict[str, Any], message: str) -> None:
    fields = sentencepiece_fields()
    for name, value in changes.items():
        fields[f"tokenizer.ggml.{name}"] = value
        if value is None:
            del fields[f"tokenizer.ggml.{name}"]
    with pytest.raises(DataError, match=rf"tokenizer\.ggml\.{message}"):
        build_tokenizer(fields)


def test_sentencepiece_with_equal_scores_raises() -> None:
    fields = sentencepiece_fields()
    fields["tokenizer.ggml.scores"] = [-1000.0] * len(fields["tokenizer.ggml.tokens"])
    with pytest.raises(DataError, match=r"scores: expected distinct scores, got -1000\.0: "):
        build_tokenizer(fields)


def test_sentencepiece_without_byte_tokens_raises() -> None:
    fields = sentencepiece_fields()
    tokens = fields["tokenizer.ggml.tokens"]
    fields["tokenizer.ggml.tokens"] = [t.replace("<0x41>", "other") for t in tokens]
    with pytest.raises(DataError, match=r"tokens: expected <0x41>, got"):
        build_tokenizer(fields)


def test_sentencepiece_file_imports_with_default_roles(tmp_path: Path) -> None:
    tokens = sentencepiece_fields() | {"tokenizer.ggml.eot_token_id": 3}
    for role in ROLES:
        del tokens[f"tokenizer.ggml.{role}_token_id"]
    tokens |= {"tokenizer.ggml.pre": None, "tokenizer.ggml.merges": None}
    tokens |= {"tokenizer.ggml.eos_token_id": None}
    tensors = make_tensors(Kind.Q8_0)
    embedding = np.ones((len(tokens["tokenizer.ggml.tokens"]), WIDTH), np.float32)
    tensors["token_embd.weight"] = (embedding, Kind.F32)
    import_to(tmp_path / "b", write_gguf(tmp_path / "x.gguf", tensors, tokens))
    bundle = TextBundle.load(tmp_path / "b")
    assert bundle.manifest.end_tokens == (2, 3)
    text = ORACLE["texts"][5]
    assert bundle.tokenizer().encode(text) == EXPECTED["spm"][5]
