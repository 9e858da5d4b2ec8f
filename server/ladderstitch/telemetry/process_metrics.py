"""The build of a server, and the resources of all its processes, for Prometheus."""

from __future__ import annotations

import os
import platform
from collections import Counter as Count
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import ladderstitch

MAIN = "replica"
"""Label of the process that answers requests; the processes that it started have their module's."""
PROC = Path("/proc")


def define_build_info(registry: CollectorRegistry) -> Gauge:
    """Return the metric `ladderstitch_build_info`: 1, with the version and the platform."""
    info = Gauge(
        "build_info",
        "1; the labels are the versions of the package and of Python, and the platform.",
        ["version", "python", "platform"],
        namespace="ladderstitch",
        registry=registry,
    )
    system = f"{platform.system()}-{platform.machine()}".lower()
    info.labels(ladderstitch.__version__, platform.python_version(), system).set(1)
    return info


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """The resources of one process: seconds of processor time, bytes, descriptors and threads."""

    cpu_s: float
    started_s: float
    """Unix time."""
    virtual_bytes: float
    resident_bytes: float
    threads: float
    open_fds: float
    max_fds: float


class ProcessCollector(Collector):
    """A collector of the metrics `process_*` with the label `process`.

    The names are those of Prometheus's client libraries. On systems without /proc it has none.
    """

    def __init__(self, proc: Path = PROC, main: str = MAIN) -> None:
        """Read from `proc`; `main` is the label of this process."""
        self._proc, self._main = proc, main
        self._ticks, self._page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples, so that registering does not read anything."""
        return self._families({})

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all processes that run now."""
        usages = {}
        for name, pid in self._processes():
            usage = self._read(pid)
            if usage is not None:
                usages[name] = usage
        return self._families(usages)

    def _families(self, usages: dict[str, ProcessUsage]) -> Iterable[Metric]:
        cpu = CounterMetricFamily(
            "process_cpu_seconds_total", "User and system processor time.", labels=["process"]
        )
        for name, usage in usages.items():
            cpu.add_metric([name], usage.cpu_s)
        yield cpu
        for metric, help_text, field in (
            ("process_start_time_seconds", "Start, in Unix time.", "started_s"),
            ("process_virtual_memory_bytes", "Virtual memory.", "virtual_bytes"),
            ("process_resident_memory_bytes", "Resident memory.", "resident_bytes"),
            ("process_threads", "Threads.", "threads"),
            ("process_open_fds", "Open file descriptors.", "open_fds"),
            ("process_max_fds", "Largest number of open file descriptors.", "max_fds"),
        ):
            gauge = GaugeMetricFamily(metric, help_text, labels=["process"])
            for name, usage in usages.items():
                gauge.add_metric([name], getattr(usage, field))
            yield gauge

    def _processes(self) -> Iterator[tuple[str, int]]:
        """Yield label and id of this process and of all that it started, in order of their ids.

        Labels are bounded: a process that replaces another one gets its label.
        """
        yield self._main, os.getpid()
        numbers: Count[str] = Count()
        for pid in sorted(self._descendants(os.getpid())):
            module = self._module(pid)
            if module is not None:
                yield f"{module}-{numbers[module]}", pid
                numbers[module] += 1

    def _descendants(self, pid: int) -> Iterator[int]:
        try:
            tasks = list((self._proc / str(pid) / "task").iterdir())
        except OSError:  # it has ended meanwhile
            return
        for task in tasks:
            try:
                children = [int(text) for text in (task / "children").read_text().split()]
            except OSError:
                continue
            for child in children:
                yield child
                yield from self._descendants(child)

    def _module(self, pid: int) -> str | None:
        """Return the last name of the module, or of the program, that a process runs."""
        try:
            words = (self._proc / str(pid) / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            return None
        if not words[0]:  # it has ended, and its parent has not noticed yet
            return None
        if "-m" in words[:-1]:
            return words[words.index("-m") + 1].rpartition(".")[2]
        return Path(words[0]).name

    def _read(self, pid: int) -> ProcessUsage | None:
        """Return what a process uses; None if it has ended or belongs to another user."""
        folder = self._proc / str(pid)
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            boot_s = self._boot_time_s()
            limits = (folder / "limits").read_text().splitlines()
            open_fds = sum(1 for _ in (folder / "fd").iterdir())
        except OSError:
            return None
        limit = next((line.split()[3] for line in limits if line.startswith("Max open files")), "0")
        return ProcessUsage(
            cpu_s=(int(fields[11]) + int(fields[12])) / self._ticks,
            started_s=boot_s + int(fields[19]) / self._ticks,
            virtual_bytes=int(fields[20]),
            resident_bytes=int(fields[21]) * self._page,
            threads=int(fields[17]),
            open_fds=open_fds,
            max_fds=float("inf") if limit == "unlimited" else float(limit),
        )

    def _boot_time_s(self) -> float:
        lines = (self._proc / "stat").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("btime"))
