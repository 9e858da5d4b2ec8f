"""What the compiler makes of each kernel, for a GPU that need not be here.

    python -m ladderstitch_kernels.compiled --target sm_90

compiles every kernel ahead of time and reads the machine code. It exits 1 if registers spill, if
loads meant to be 128 bits wide are not, if tensor cores meant to be used are not, or if a signal or
poll has lost its memory order: every signal a system-scope release behind one fence and a barrier,
every poll a system-scope acquire.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ladderstitch_kernels.comm.all_reduce import one_shot_kernel, two_shot_kernel
from ladderstitch_kernels.comm.split_phase import (
    gemv_post_kernel,
    post_kernel,
    wait_add_norm_kernel,
)
from ladderstitch_kernels.launch import interpreted
from ladderstitch_kernels.ops.add_rms_norm import add_rms_norm_kernel
from ladderstitch_kernels.ops.decode_attention import decode_attention_kernel, merge_splits_kernel
from ladderstitch_kernels.ops.rope_append import rope_append_kernel
from ladderstitch_kernels.ops.stitch_linear import stitch_kernel
from ladderstitch_kernels.ops.swiglu import swiglu_kernel

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at a size that counts, and what its machine code must hold."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    wide_loads: bool = True
    tensor_cores: bool = False
    full_rate: bool = False
    """A wide product: the tensor cores must be fed in the target's fastest way."""
    signals: int = 0
    polls: int = 0
    """Waits; each shows as two polls, before its loop and in it."""


@dataclass(frozen=True, slots=True)
class Code:
    """What one kernel came to on one target."""

    case: str
    target: str
    seconds: float
    spilled_bytes: int
    stack_accesses: int
    wide_loads: int
    tensor_core_ops: int
    full_rate_ops: int
    releases: int
    acquires: int
    fences: int
    fences_without_barrier: int
    broken: list[str] = field(default_factory=list)


COMM = {"RANKS": 8, "RANKS_PAD": 8}
TABLES = {"slots": "*i64", "arrivals": "*i64", "counts": "*i32", "rank": "i32"}
GEMV = {
    "x": "*bf16",
    "weight": "*bf16",
    **TABLES,
    "m": "i32",
    "n": "i32",
    "k": "i32",
    "max_rows": "i32",
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
    "most_pages": "i32",
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
    Case(
        "gemv_post, 1 row",
        gemv_post_kernel,
        GEMV,
        {**COMM, "SLOTS": 4, "M": 1, "BLOCK_N": 64, "BLOCK_K": 256, "UPCAST": False},
        signals=1,
    ),
    Case(
        "gemv_post, 16 rows",
        gemv_post_kernel,
        GEMV,
        {**COMM, "SLOTS": 4, "M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "UPCAST": False},
        tensor_cores=True,
        signals=1,
    ),
    Case(
        "post",
        post_kernel,
        {"x": "*bf16", **TABLES, "m": "i32", "n": "i32", "max_rows": "i32"},
        {**COMM, "SLOTS": 4, "BLOCK_M": 16, "BLOCK_N": 64},
        signals=1,
    ),
    Case(
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
            "max_rows": "i32",
            "eps": "fp32",
            "programs": "i32",
        },
        {"RANKS": 8, "SLOTS": 4, "RANKS_PAD": 8, "BLOCK": 8192, "ADD": True, "NORM": True},
        warps=16,
        polls=1,
    ),
    Case(
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
    Case(
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
    Case(
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
    Case(
        "swiglu", swiglu_kernel, {"gate_up": "*bf16", "out": "*bf16", "f": "i32"}, {"BLOCK": 1024}
    ),
    Case(
        "rope_append",
        rope_append_kernel,
        {
            "qkv": "*bf16",
            "cosines": "*fp32",
            "sines": "*fp32",
            "positions": "*i32",
            "slots": "*i64",
            "q_out": "*bf16",
            "key_cache": "*bf16",
            "value_cache": "*bf16",
            "heads": "i32",
        },
        {"KV_HEADS": 8, "HALF": 64, "HEADS_PAD": 64, "HALF_PAD": 64},
    ),
    Case(
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
    Case(
        "merge_splits",
        merge_splits_kernel,
        {"partial": "*fp32", "weights": "*fp32", "out": "*bf16"},
        {"WIDTH": 128, "SPLITS": 8, "SPLITS_PAD": 8, "WIDTH_PAD": 128},
        wide_loads=False,
    ),
    Case(
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
        stages=4,
        tensor_cores=True,
        full_rate=True,
    ),
    Case(
        "stitch_pending, few rows",
        stitch_kernel,
        STITCH,
        {
            "PENDING": True,
            "BIAS": True,
            "RANK_PAD": 16,
            "BLOCK_M": 16,
            "BLOCK_N": 64,
            "BLOCK_K": 64,
            "UPCAST": False,
        },
        stages=4,
        tensor_cores=True,
    ),
)
WARP_GROUP_OPS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": r"UTC\w*MMA"}
"""What feeds the tensor cores at full rate: on newer GPUs, from a whole warp group at a time."""


def compile_case(case: Case, target: str) -> Code:
    """Compile one kernel and hold its code to what the case says."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    whole = ("m", "n", "k", "f", "max_rows", "slot_elements", "piece", "heads", "split_tokens")
    divisible = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if case.types.get(name, "").startswith("*") or (name in whole and name in case.types)
    }
    start = time.perf_counter()
    compiled = triton.compile(
        ASTSource(case.kernel, signature, dict(case.constants), divisible),
        target=GPUTarget("cuda", TARGETS[target], 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    seconds = time.perf_counter() - start
    code = _read(case, target, seconds, compiled.asm["ptx"], compiled.asm["cubin"])
    code.broken.extend(_broken(case, code))
    return code


def _read(case: Case, target: str, seconds: float, ptx: str, cubin: bytes) -> Code:
    machine = _disassemble(cubin)
    resources = _tool("cuobjdump", "-res-usage", cubin)
    fences = [at for at, line in enumerate(machine) if "MEMBAR" in line and ".SYS" in line]
    return Code(
        case=case.name,
        target=target,
        seconds=round(seconds, 2),
        spilled_bytes=sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", resources)),
        stack_accesses=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in machine),
        wide_loads=sum(
            bool(re.search(r"\b(LDG\S*\.128|LDGSTS\S*\.128)", line)) for line in machine
        ),
        tensor_core_ops=sum(bool(re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)", line)) for line in machine),
        full_rate_ops=sum(
            bool(re.search(rf"\b{WARP_GROUP_OPS[target]}", line)) for line in machine
        ),
        releases=len(re.findall(r"atom\.global\.(?:sys\.release|release\.sys)", ptx)),
        acquires=len(re.findall(r"atom\.global\.(?:sys\.acquire|acquire\.sys)", ptx)),
        fences=len(fences),
        fences_without_barrier=sum(not _barrier_before(machine, fence) for fence in fences),
    )


def _barrier_before(machine: Sequence[str], fence: int) -> bool:
    """Whether a barrier stands between the last store to memory and the fence."""
    for line in reversed(machine[:fence]):
        if "BAR.SYNC" in line:
            return True
        if re.search(r"\b(STG|ST\.E)", line):
            return False
    return False


def _broken(case: Case, code: Code) -> list[str]:
    wanted = {
        "no spills": code.spilled_bytes == code.stack_accesses == 0,
        "128-bit loads": code.wide_loads > 0 or not case.wide_loads,
        "tensor cores": code.tensor_core_ops > 0 or not case.tensor_cores,
        f"{WARP_GROUP_OPS[code.target]}": code.full_rate_ops > 0 or not case.full_rate,
        f"{case.signals} system-scope releases": code.releases == case.signals,
        f"{2 * case.polls} system-scope acquires": code.acquires == 2 * case.polls,
        "one fence for each signal": code.fences == case.signals,
        "a barrier before each fence": code.fences_without_barrier == 0,
    }
    return [rule for rule, holds in wanted.items() if not holds]


def _disassemble(cubin: bytes) -> list[str]:
    return _tool("cuobjdump", "-sass", cubin).splitlines()


def _tool(name: str, option: str, cubin: bytes) -> str:
    """Output of one of the CUDA tools that come with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return ran.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a table (or JSON lines), and say how many kernels broke a rule."""
    parser = argparse.ArgumentParser(prog="python -m ladderstitch_kernels.compiled")
    parser.description = (__doc__ or "").partition("\n")[0]
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: sm_90")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kernel")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: interpreted functions cannot be compiled")
    failed = 0
    for target in options.target or ["sm_90"]:
        for case in CASES:
            if options.only not in case.name:
                continue
            code = compile_case(case, target)
            failed += bool(code.broken)
            print(json.dumps(asdict(code)) if options.json else _line(code))  # noqa: T201
    return 1 if failed else 0


def _line(code: Code) -> str:
    verdict = "ok" if not code.broken else "BROKEN: " + ", ".join(code.broken)
    return (
        f"{code.target:7}{code.case:26}{code.seconds:6.1f} s  {code.wide_loads:3} wide loads  "
        f"{code.tensor_core_ops:4} tensor-core ops  {code.releases} releases  "
        f"{code.acquires} acquires  {code.fences} fences  {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
