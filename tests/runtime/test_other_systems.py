"""Substitutes for what only Linux has; a server is imported without it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ladderstitch.runtime import cores
from ladderstitch.runtime.cores import CgroupFiles, usable_cores
from ladderstitch.text.comm import shared_memory
from ladderstitch.vision.engine.base import _anonymous_file

IMPORT_ALL = """
import os, pkgutil, sys
import onnxruntime, torch, uvicorn  # choose by the system themselves, when they are imported
from importlib import import_module

sys.modules["triton"] = None  # is installed on Linux only

for name in ("sched_getaffinity", "sched_setaffinity", "memfd_create", "posix_fallocate"):
    delattr(os, name)
sys.platform = "darwin"
import ladderstitch

left_out = ("__main__", "ray_serve", "training", "importers")
modules = pkgutil.walk_packages(ladderstitch.__path__, "ladderstitch.")
names = [module.name for module in modules if module.name.split(".")[1] not in left_out]
for name in names:
    if name != "ladderstitch.text.comm.symmetric":  # sums by kernels of Triton
        import_module(name)
print(len(names))
"""


def test_package_imports_without_what_only_linux_has() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_ALL], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


def test_cores_without_affinity_are_those_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 12)
    files = CgroupFiles(tmp_path / "root", tmp_path / "membership")
    assert usable_cores(files=files) == 12


def test_buffers_without_memfd_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    descriptor = _anonymous_file()
    try:
        os.ftruncate(descriptor, 4096)
        with mmap.mmap(descriptor, 4096) as memory:
            memory[:4] = b"data"
            assert os.pread(descriptor, 4, 0) == b"data"
    finally:
        os.close(descriptor)


def test_shared_file_without_fallocate_has_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    path = shared_memory.create_shared_file(10_000, "a test")
    assert path.parent == tmp_path
    assert path.stat().st_size == 10_000
