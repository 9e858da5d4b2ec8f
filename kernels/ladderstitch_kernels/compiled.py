"""Checks of the machine code of each kernel, for a target GPU that need not be present.

    python -m ladderstitch_kernels.compiled --target sm_90

The command compiles every kernel ahead of time and reads the machine code. It exits with 1 if a
kernel breaks a rule: no spilled registers, 128-bit loads, tensor cores, and the memory order of
signals and polls. Every signal is a system-scope release after one fence and a barrier, and every
poll is a system-scope acquire.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ladderstitch_kernels.compiled_cases import CASES, KernelCase
from ladderstitch_kernels.launch import interpreted

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """Figures of one kernel's machine code on one target; `broken` names the broken rules."""

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


WARP_GROUP_OPS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": r"UTC\w*MMA"}
"""Tensor-core instructions of full rate; those of newer GPUs work on a whole warp group."""


def compile_case(case: KernelCase, target: str) -> CompiledKernel:
    """Compile one kernel for a target and check its code against the rules of the case."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    multiples = ("m", "n", "k", "f", "slot_elements", "piece", "heads", "split_tokens")
    divisible = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if case.types.get(name, "").startswith("*") or (name in multiples and name in case.types)
    }
    start = time.perf_counter()
    compiled = triton.compile(
        ASTSource(case.kernel, signature, dict(case.constants), divisible),
        target=GPUTarget("cuda", TARGETS[target], 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    seconds = time.perf_counter() - start
    code = _read_code(case, target, seconds, compiled.asm["ptx"], compiled.asm["cubin"])
    code.broken.extend(_broken_rules(case, code))
    return code


def _read_code(
    case: KernelCase, target: str, seconds: float, ptx: str, cubin: bytes
) -> CompiledKernel:
    machine = _disassemble(cubin)
    resources = _tool("cuobjdump", "-res-usage", cubin)
    fences = [at for at, line in enumerate(machine) if "MEMBAR" in line and ".SYS" in line]
    return CompiledKernel(
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
    """Return whether a barrier is between the last store to memory and the fence."""
    for line in reversed(machine[:fence]):
        if "BAR.SYNC" in line:
            return True
        if re.search(r"\b(STG|ST\.E)", line):
            return False
    return False


def _broken_rules(case: KernelCase, code: CompiledKernel) -> list[str]:
    rules = {
        "no spills": code.spilled_bytes == code.stack_accesses == 0,
        "128-bit loads": code.wide_loads > 0 or not case.wide_loads,
        "tensor cores": code.tensor_core_ops > 0 or not case.tensor_cores,
        f"{WARP_GROUP_OPS[code.target]}": code.full_rate_ops > 0 or not case.full_rate,
        f"{case.signals} system-scope releases": code.releases == case.signals,
        f"{2 * case.polls} system-scope acquires": code.acquires == 2 * case.polls,
        "one fence for each signal": code.fences == case.signals,
        "a barrier before each fence": code.fences_without_barrier == 0,
    }
    return [rule for rule, holds in rules.items() if not holds]


def _disassemble(cubin: bytes) -> list[str]:
    return _tool("cuobjdump", "-sass", cubin).splitlines()


def _tool(name: str, option: str, cubin: bytes) -> str:
    """Return the output of one of the CUDA tools that are part of Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return ran.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all cases and print a line for each; return 1 if a kernel broke a rule, else 0."""
    parser = argparse.ArgumentParser(prog="python -m ladderstitch_kernels.compiled")
    parser.description = (__doc__ or "").partition("\n")[0]
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: sm_90")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each kernel")
    parser.add_argument("--only", default="", help="compile only kernels whose name contains this")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error(
            "TRITON_INTERPRET: expected it unset, because interpreted kernels do not compile"
        )
    failed = 0
    for target in options.target or ["sm_90"]:
        for case in CASES:
            if options.only not in case.name:
                continue
            code = compile_case(case, target)
            failed += bool(code.broken)
            print(json.dumps(asdict(code)) if options.json else _format_line(code))  # noqa: T201
    return 1 if failed else 0


def _format_line(code: CompiledKernel) -> str:
    status = "ok" if not code.broken else "BROKEN: " + ", ".join(code.broken)
    return (
        f"{code.target:7}{code.case:26}{code.seconds:6.1f} s  {code.wide_loads:3} wide loads  "
        f"{code.tensor_core_ops:4} tensor-core ops  {code.releases} releases  "
        f"{code.acquires} acquires  {code.fences} fences  {status}"
    )


if __name__ == "__main__":
    sys.exit(main())
