"""Tests of the number format of a language model, by the instructions of the CPU."""

from __future__ import annotations

import pytest
import torch

from ladderstitch.errors import ConfigError
from ladderstitch.runtime import device
from ladderstitch.runtime.device import (
    has_bfloat16_instructions,
    resolve_text_dtype,
)


@pytest.mark.parametrize("native", [True, False])
def test_text_dtype_auto_is_float32_on_cpus(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(device, "has_bfloat16_instructions", lambda: native)
    assert resolve_text_dtype("auto", "cpu") == torch.float32
    assert resolve_text_dtype("float32", "cpu") == torch.float32
    assert resolve_text_dtype("auto", "cuda") == torch.bfloat16


def test_text_dtype_native_bfloat16_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bfloat16_instructions", lambda: True)
    assert resolve_text_dtype("bfloat16", "cpu") == torch.bfloat16


def test_text_dtype_emulated_bfloat16_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bfloat16_instructions", lambda: False)
    with pytest.raises(ConfigError, match="dtype: expected auto or float32 on a CPU without"):
        resolve_text_dtype("bfloat16", "cpu")
    assert resolve_text_dtype("bfloat16", "cuda:0") == torch.bfloat16


def test_bfloat16_needs_more_than_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not has_bfloat16_instructions()
