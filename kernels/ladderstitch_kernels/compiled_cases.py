"""The kernels that `compiled` compiles, each at a size that matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ladderstitch_kernels.comm.all_reduce import one_shot_kernel, two_shot_kernel
from ladderstitch_kernels.comm.split_phase import (
    gemv_post_kernel,
    post_kernel,
    wait_add_norm_kernel,
)
from ladderstitch_kernels.ops.add_rms_norm import add_rms_norm_kernel
from ladderstitch_kernels.ops.decode_attention import decode_attention_kernel, merge_splits_kernel
from ladderstitch_kernels.ops.rope_append import rope_append_kernel
from ladderstitch_kernels.ops.stitch_linear import stitch_kernel
from ladderstitch_kernels.ops.swiglu import swiglu_kernel


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A kernel with its argument types and constants, and what its machine code must contain."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    wide_loads: bool = True
    tensor_cores: bool = False
    full_rate: bool = False
    """Whether the code must use the target's fastest tensor-core instruction."""
    signals: int = 0
    polls: int = 0
    """The number of waits; each compiles to two polls, before its loop and in it."""


COMM = {"RANKS": 8, "RANKS_PAD": 8}
TABLES = {"slots": "*i64", "arrivals": "*i64", "counts": "*i32", "rank": "i32"}
GEMV = {
    "x": "*bf16",
    "weight": "*bf16",
    **TABLES,
    "m": "i32",
    "n": "i32",
    "k": "i32",
    "slot_elements": "i32",
}
DECODE = {
    "q": "*bf16",
    "key_cache": "*bf16",
    "value_cache": "*bf16",
    "pages": "*i32",
    "lengths": "*i32",
    "partial": "*fp32",
    "weights": "*fp32",
    "scale": "fp32",
    "max_pages": "i32",
    "split_tokens": "i32",
    "heads": "i32",
}
STITCH = {
    "x": "*bf16",
    "pending": "*bf16",
    "weight": "*bf16",
    "bias": "*bf16",
    "down": "*bf16",
    "up": "*bf16",
    "out": "*bf16",
    "pending_out": "*bf16",
    "m": "i32",
    "n": "i32",
    "k": "i32",
    "rank": "i32",
}
CASES = (
    KernelCase(
        "gemv_post, 1 row",
        gemv_post_kernel,
        GEMV,
        {**COMM, "SLOTS": 4, "M": 1, "BLOCK_N": 32, "BLOCK_K": 512, "UPCAST": False},
        signals=1,
    ),
    KernelCase(
        "gemv_post, 16 rows",
        gemv_post_kernel,
        GEMV,
        {**COMM, "SLOTS": 4, "M": 16, "BLOCK_N": 32, "BLOCK_K": 256, "UPCAST": False},
        stages=5,
        tensor_cores=True,
        signals=1,
    ),
    KernelCase(
        "post",
        post_kernel,
        {"x": "*bf16", **TABLES, "m": "i32", "n": "i32", "slot_elements": "i32"},
        {**COMM, "SLOTS": 4, "BLOCK_M": 16, "BLOCK_N": 32},
        warps=2,
        signals=1,
    ),
    KernelCase(
        "wait_add_norm",
        wait_add_norm_kernel,
        {
            "slots": "*bf16",
            "arrivals": "*i32",
            "counts": "*i32",
            "residual": "*bf16",
            "weight": "*bf16",
            "total_out": "*bf16",
            "norm_out": "*bf16",
            "n": "i32",
            "slot_elements": "i32",
            "eps": "fp32",
            "programs": "i32",
        },
        {"RANKS": 8, "SLOTS": 4, "RANKS_PAD": 8, "BLOCK": 8192, "ADD": True, "NORM": True},
        warps=16,
        polls=1,
    ),
    KernelCase(
        "one_shot",
        one_shot_kernel,
        {
            "x": "*bf16",
            "out": "*bf16",
            "slots": "*bf16",
            "slot_table": "*i64",
            "arrivals": "*i32",
            "arrival_table": "*i64",
            "counts": "*i32",
            "rank": "i32",
            "n": "i32",
            "slot_elements": "i32",
        },
        {**COMM, "SLOTS": 2, "BLOCK": 2048},
        warps=8,
        signals=1,
        polls=1,
    ),
    KernelCase(
        "two_shot",
        two_shot_kernel,
        {
            "x": "*bf16",
            "out": "*bf16",
            "inbox": "*bf16",
            "inbox_table": "*i64",
            "outbox": "*bf16",
            "outbox_table": "*i64",
            "arrivals": "*i32",
            "arrival_table": "*i64",
            "counts": "*i32",
            "rank": "i32",
            "n": "i32",
            "piece": "i32",
        },
        {**COMM, "BLOCK": 2048},
        warps=8,
        signals=2,
        polls=2,
    ),
    KernelCase(
        "add_rms_norm",
        add_rms_norm_kernel,
        {
            "x": "*bf16",
            "residual": "*bf16",
            "weight": "*bf16",
            "total_out": "*bf16",
            "norm_out": "*bf16",
            "n": "i32",
            "eps": "fp32",
        },
        {"BLOCK": 8192},
        warps=8,
    ),
    KernelCase(
        "swiglu", swiglu_kernel, {"gate_up": "*bf16", "out": "*bf16", "f": "i32"}, {"BLOCK": 1024}
    ),
    KernelCase(
        "rope_append",
        rope_append_kernel,
        {
            "qkv": "*bf16",
            "cosines": "*bf16",
            "sines": "*bf16",
            "positions": "*i64",
            "slots": "*i64",
            "q_out": "*bf16",
            "key_cache": "*bf16",
            "value_cache": "*bf16",
            "heads": "i32",
        },
        {"KV_HEADS": 8, "HALF": 64, "HEADS_PAD": 64, "HALF_PAD": 64},
    ),
    KernelCase(
        "paged_decode_attention",
        decode_attention_kernel,
        DECODE,
        {
            "PAGE": 16,
            "WIDTH": 128,
            "KV_HEADS": 8,
            "SPLITS": 8,
            "GROUP_PAD": 16,
            "WIDTH_PAD": 128,
            "BLOCK": 64,
            "UPCAST": False,
        },
        tensor_cores=True,
    ),
    KernelCase(
        "merge_splits",
        merge_splits_kernel,
        {"partial": "*fp32", "weights": "*fp32", "out": "*bf16"},
        {"WIDTH": 128, "SPLITS": 8, "SPLITS_PAD": 8, "WIDTH_PAD": 128},
        wide_loads=False,
    ),
    KernelCase(
        "stitch_linear, wide",
        stitch_kernel,
        STITCH,
        {
            "PENDING": False,
            "BIAS": True,
            "RANK_PAD": 16,
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 64,
            "UPCAST": False,
        },
        warps=8,
        stages=3,
        tensor_cores=True,
        full_rate=True,
    ),
    KernelCase(
        "stitch_linear, no update",
        stitch_kernel,
        STITCH,
        {
            "PENDING": False,
            "BIAS": True,
            "RANK_PAD": 0,
            "BLOCK_M": 64,
            "BLOCK_N": 64,
            "BLOCK_K": 64,
            "UPCAST": False,
        },
        stages=4,
        tensor_cores=True,
    ),
    KernelCase(
        "stitch_pending, few rows",
        stitch_kernel,
        STITCH,
        {
            "PENDING": True,
            "BIAS": True,
            "RANK_PAD": 16,
            "BLOCK_M": 16,
            "BLOCK_N": 32,
            "BLOCK_K": 64,
            "UPCAST": False,
        },
        stages=4,
        tensor_cores=True,
    ),
)
