"""The machine code of kernels for GPUs, which shows what the interpreter cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.kernels.mutants import Mutant, write_mutant


def run_compiled(folder: Path, *options: str) -> tuple[int, list[dict[str, object]]]:
    """Run the command and return its exit status and lines; a package in `folder` comes first."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "ladderstitch_kernels.compiled", "--json", *options]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ran.returncode in (0, 1), ran.stderr
    return ran.returncode, [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize(
    "target",
    [
        "sm_90",
        pytest.param("sm_80", marks=pytest.mark.slow),
        pytest.param("sm_100", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_and_keeps_its_rules(tmp_path: Path, target: str) -> None:
    status, lines = run_compiled(tmp_path, "--target", target)
    assert [(line["case"], line["broken"]) for line in lines if line["broken"]] == []
    assert status == 0
    assert len(lines) == 14


@pytest.mark.parametrize(
    ("edit", "kernel", "rule"),
    [
        (('sem="release"', 'sem="relaxed"'), "gemv_post, 1 row", "1 system-scope releases"),
        (('sem="acquire"', 'sem="relaxed"'), "wait_add_norm", "2 system-scope acquires"),
        (('scope="sys"', 'scope="gpu"'), "gemv_post, 1 row", "1 system-scope releases"),
        (
            ("    tl.debug_barrier()\n    peer", "    peer"),
            "gemv_post, 1 row",
            "a barrier before each fence",
        ),
    ],
    ids=["relaxed signal", "relaxed poll", "narrow scope", "no barrier"],
)
def test_compiled_with_lost_memory_order_names_the_rule(
    tmp_path: Path, edit: tuple[str, str], kernel: str, rule: str
) -> None:
    write_mutant(Mutant("comm/signals", (edit,)), tmp_path)
    status, lines = run_compiled(tmp_path, "--only", kernel)
    assert status == 1
    (line,) = lines
    assert rule in line["broken"]  # type: ignore[operator]  # JSON
