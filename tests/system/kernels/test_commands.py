"""The commands of the kernel package on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import ladderstitch_kernels

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run_command(name: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", f"ladderstitch_kernels.{name}"],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@without_gpu
@pytest.mark.parametrize("name", ["check", "bench"])
def test_command_without_gpu_prints_the_reason(name: str) -> None:
    assert run_command(name).startswith("skipped: ")


def test_check_in_the_interpreter_passes() -> None:
    lines = run_command("check", TRITON_INTERPRET="1").splitlines()
    assert lines[0] == "in Triton's interpreter"
    assert len(lines) == 35
    assert all(line.endswith("  ok") for line in lines[1:])


def test_public_names_are_sorted_and_documented() -> None:
    assert sorted(ladderstitch_kernels.__all__) == ladderstitch_kernels.__all__
    for name in ladderstitch_kernels.__all__:
        assert getattr(ladderstitch_kernels, name).__doc__
