"""Statistics of batch normalisation by path: measured ones in memory, others in a file.

The statistics of one path are small, those of all paths are not: 32 paths of OFA MobileNetV3 have a
tenth of the weights' bytes. Those of a file are therefore read when a path is used.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ladderstitch.bundles import check_tensors
from ladderstitch.errors import BundleError
from ladderstitch.vision.models.nested.slices import Statistics

MEAN, VARIANCE = "running_mean", "running_var"
Widths = dict[int, dict[str, int]]
"""Channels of every batch normalisation by path and name."""


class StatisticsFile:
    """A safetensors file of the statistics of several paths, in float32, open until collected.

    It is read and not mapped: a file that is cut short while it is mapped ends the process.
    """

    def __init__(self, path: Path, widths: Widths) -> None:
        """Read the header; raises `BundleError` unless the tensors are those of `widths`."""
        try:
            safe_open(path, "pt").keys()  # checks the offsets, which it has no method for
            self._descriptor = os.open(path, os.O_RDONLY)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path}: {error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._path, self._version = path, self._read_version()
        # Paths share the strings, and positions are plain numbers: for 32 paths of OFA MobileNetV3,
        # 0.15 MB instead of 0.75 MB.
        self.widths = {
            stitch: {sys.intern(norm): width for norm, width in norms.items()}
            for stitch, norms in widths.items()
        }
        starts = self._read_starts()
        self._starts = {
            stitch: array("Q", (starts[name] for name in _names(stitch, norms)))
            for stitch, norms in widths.items()
        }

    def _read_starts(self) -> dict[str, int]:
        """Return the positions of all tensors in the file; raises `BundleError` as `__init__`."""
        (size,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        header = json.loads(os.pread(self._descriptor, size, 8))
        header.pop("__metadata__", None)
        expected = {
            name: (width,)
            for stitch, norms in self.widths.items()
            for norm, width in norms.items()
            for name in _names(stitch, [norm])
        }
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        check_tensors(expected, shapes, where=str(self._path))
        for name, entry in header.items():
            if entry["dtype"] != "F32":
                raise BundleError(f"{self._path}: {name}: expected F32, got {entry['dtype']}")
        return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, stitch: int) -> Statistics:
        """Return the statistics of a path; raises `BundleError` if the file has changed."""
        if self._read_version() != self._version:
            raise BundleError(f"{self._path}: changed since it was loaded; load the model again")
        starts = iter(self._starts[stitch])
        return {
            norm: (self._read_tensor(next(starts), width), self._read_tensor(next(starts), width))
            for norm, width in self.widths[stitch].items()
        }

    def _read_tensor(self, start: int, width: int) -> Tensor:
        data = bytearray(os.pread(self._descriptor, 4 * width, start))
        if len(data) != 4 * width:
            raise BundleError(
                f"{self._path}: expected {4 * width} bytes at {start}, got {len(data)}"
            )
        return torch.frombuffer(data, dtype=torch.float32)

    def _read_version(self) -> tuple[int, int]:
        """Return what a write into the file changes; its removal or replacement do not."""
        status = os.fstat(self._descriptor)
        return status.st_mtime_ns, status.st_size


class PathStatistics(MutableMapping[int, Statistics]):
    """The statistics of the paths that have some, by path.

    Of those in a file, the ones used last stay in memory, up to a limit. On other devices than the
    CPU all that were used stay, because captured graphs name their addresses. Threads may share
    one.
    """

    def __init__(self) -> None:
        self._held: dict[int, Statistics] = {}
        self._file: StatisticsFile | None = None
        self._recent: OrderedDict[int, Statistics] = OrderedDict()
        self._limit = 0.0
        self._like = torch.empty(0, device="cpu")  # has the device and the type of the weights
        self._lock = threading.Lock()

    def read_from(self, file: StatisticsFile, limit: float) -> None:
        """Take the statistics of a file's paths from there, in place of those in memory.

        At most `limit` numbers stay in memory, and those of one path in any case.
        """
        self._file, self._limit = file, limit
        self._recent.clear()
        for stitch in file.widths:
            self._held.pop(stitch, None)

    def convert(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert all statistics, also those that are read later."""
        self._like = function(self._like)
        self._recent.clear()
        self._held = {stitch: _converted(norms, function) for stitch, norms in self._held.items()}

    def __getitem__(self, stitch: int) -> Statistics:
        """Return the statistics of a path.

        Raises `KeyError` if it has none, and `BundleError` if their file has changed.
        """
        with self._lock:
            if stitch in self._held or self._file is None or stitch not in self._file.widths:
                return self._held[stitch]
            if stitch not in self._recent:
                norms = self._file.read(stitch)
                self._recent[stitch] = _converted(norms, lambda t: t.to(self._like))
                self._forget_oldest(self._file.widths)
            self._recent.move_to_end(stitch)
            return self._recent[stitch]

    def _forget_oldest(self, widths: Widths) -> None:
        """Forget what was used least recently, as far as the limit demands."""
        if self._like.device.type != "cpu":
            return
        numbers = {stitch: 2 * sum(widths[stitch].values()) for stitch in self._recent}
        kept = sum(numbers.values())
        while kept > self._limit and len(self._recent) > 1:
            stitch, _ = self._recent.popitem(last=False)
            kept -= numbers[stitch]

    def __contains__(self, stitch: object) -> bool:
        """Return whether a path has statistics, without reading them."""
        return stitch in self._held or (self._file is not None and stitch in self._file.widths)

    def __setitem__(self, stitch: int, statistics: Statistics) -> None:
        self._held[stitch] = statistics

    def __delitem__(self, stitch: int) -> None:
        """Forget the statistics in memory that were set."""
        del self._held[stitch]

    def __iter__(self) -> Iterator[int]:
        stored = self._file.widths if self._file is not None else {}
        return iter({**stored, **self._held})

    def __len__(self) -> int:
        return len(list(iter(self)))


def _converted(norms: Statistics, function: Callable[[Tensor], Tensor]) -> Statistics:
    return {name: (function(mean), function(variance)) for name, (mean, variance) in norms.items()}


def _names(stitch: int, norms: Iterable[str]) -> list[str]:
    """Return the names of a path's tensors, the mean and the variance of every norm."""
    return [tensor_name(stitch, norm, part) for norm in norms for part in (MEAN, VARIANCE)]


def tensor_name(stitch: int, norm: str, part: str) -> str:
    """Return the name of a path's tensor in the file."""
    return f"{stitch}.{norm}.{part}"
