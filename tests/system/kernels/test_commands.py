"""The commands for a GPU: what they can do without one, and what they say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import ladderstitch_kernels

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def command(name: str, **environment: str) -> str:
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
def test_without_a_gpu_the_reason_is_said(name: str) -> None:
    assert command(name).startswith("skipped: ")


def test_the_check_runs_in_the_interpreter() -> None:
    lines = command("check", TRITON_INTERPRET="1").splitlines()
    assert lines[0] == "in Triton's interpreter"
    assert len(lines) == 27
    assert all(line.endswith("  ok") for line in lines[1:])


def test_what_the_package_offers() -> None:
    assert sorted(ladderstitch_kernels.__all__) == ladderstitch_kernels.__all__
    for name in ladderstitch_kernels.__all__:
        assert getattr(ladderstitch_kernels, name).__doc__
