"""What was seen while processes were killed and stopped, and which of it is not allowed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from ladderstitch_loadtest.faults.soak_result import ALLOWED_AROUND_RESTARTS

VITAL = frozenset({"engine", "rank"})
"""Kinds of processes without which a model cannot answer; others start again when needed."""
ALARM_S = 2.0
"""Seconds of trouble after which a replica must report NOT_SERVING."""
ALL_CLEAR_S = 5.0
"""Seconds after the end of all trouble after which a replica must report SERVING."""
LATE_S = 1.0
"""Seconds after its deadline within which a request must have ended."""
EARLY_S = 0.1
"""Seconds before its deadline at which a request may end with one of `EXPIRED`."""
EXPIRED = frozenset({"DEADLINE_EXCEEDED", "EXPIRED_IN_QUEUE", "EXPIRED_IN_COMPUTE"})
"""What callers and the server call the end of a request whose deadline has passed."""
NO_REPLICA = "NOT_READY"
"""The reason of a gateway, also UNAVAILABLE, if all of its replicas have trouble."""
AFTERMATH_S = 1.0
"""Seconds after the end of trouble in which a request may still begin that the trouble hits."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A signal to a worker of a replica, in seconds on the clock of the run.

    The trouble ends at `recovered_s`: a stopped process was continued, or a replacement answered a
    request. It is infinite if neither happened. `replaced` says that the process has ended.
    """

    replica: int
    kind: str
    signal: str
    at_s: float
    recovered_s: float
    held_s: float = 0.0
    replaced: bool = False

    @property
    def is_vital(self) -> bool:
        """Whether a model cannot answer without the process."""
        return self.kind in VITAL

    @property
    def name(self) -> str:
        """The fault in a few words."""
        held = f" for {self.held_s:.1f} s" if self.held_s else ""
        return f"{self.at_s:.1f} s, replica {self.replica}: {self.signal} of {self.kind}{held}"


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """How a request ended: `OK`, `WRONG`, or the reason or status of its failure."""

    kind: str
    started_s: float
    took_s: float
    deadline_s: float
    end: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class HealthSample:
    """The health of a replica at one time; `serving` is None if it did not say."""

    at_s: float
    serving: bool | None


@dataclass(slots=True)
class StopsReport:
    """One run: `health` has the samples by replica and protocol, `gateway` those of the gateway."""

    target: str
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    ends: list[RequestEnd] = field(default_factory=list)
    health: dict[tuple[int, str], list[HealthSample]] = field(default_factory=dict)
    gateway: list[HealthSample] = field(default_factory=list)
    left_over: float = 0.0

    def list_failures(self) -> list[str]:
        """Return a line for each thing that must not happen."""
        lines = [line for end in self.ends if (line := explain(end, self.faults))]
        for (replica, protocol), samples in self.health.items():
            faults = self._vital_faults(replica)
            found = [*find_late_alarms(faults, samples), *find_false_health(faults, samples)]
            found += find_late_all_clears(faults, samples)
            lines += [f"{protocol} health, {line}" for line in (*found, *find_silence(samples))]
        lines += [f"gateway health, {line}" for line in find_silence(self.gateway)]
        lines += find_false_alarms(self.faults, self.gateway)
        lines += [f"{f.name}: no recovery" for f in self.faults if math.isinf(f.recovered_s)]
        if self.left_over:
            lines.append(f"{self.left_over:.0f} requests are left over, though all callers stopped")
        return lines

    def alarms_s(self) -> list[float]:
        """Return the seconds to NOT_SERVING for each fault whose trouble lasted that long."""
        return [
            seconds
            for (replica, _), samples in self.health.items()
            for fault in self._vital_faults(replica)
            if math.isfinite(seconds := alarm_s(fault, samples))
        ]

    def all_clears_s(self) -> list[float]:
        """Return the seconds from the end of trouble to SERVING, unless more trouble came first."""
        return [
            seconds
            for (replica, _), samples in self.health.items()
            for fault, quiet_s in quiet_periods(self._vital_faults(replica))
            if (seconds := all_clear_s(fault, samples)) <= quiet_s
        ]

    def _vital_faults(self, replica: int) -> list[Fault]:
        return [f for f in self.faults if f.replica == replica and f.is_vital]

    def recoveries_s(self) -> list[float]:
        """Return the seconds of trouble of each fault of a vital process."""
        return [f.recovered_s - f.at_s for f in self.faults if f.is_vital]

    def to_dict(self) -> dict[str, object]:
        """Return the figures for a result file."""
        counts: dict[str, Counter[str]] = {}
        for end in self.ends:
            counts.setdefault(end.kind, Counter())[end.end] += 1
        return {
            "target": self.target,
            "seconds": round(self.seconds, 1),
            "requests": len(self.ends),
            "ends": {kind: dict(ends) for kind, ends in counts.items()},
            "longest_s": round(max((end.took_s for end in self.ends), default=0.0), 2),
            "faults": [asdict(fault) for fault in self.faults],
            "seconds_to_not_serving": sorted(round(s, 2) for s in self.alarms_s()),
            "seconds_to_serving": sorted(round(s, 2) for s in self.all_clears_s()),
            "seconds_of_trouble": sorted(round(s, 2) for s in self.recoveries_s()),
            "left_over": self.left_over,
            "failures": self.list_failures(),
        }


def explain(request: RequestEnd, faults: Sequence[Fault]) -> str:
    """Return what is wrong with the end of a request; an empty text if it is allowed."""
    about = f"{request.started_s:.1f} s, {request.kind}"
    if request.end == "WRONG":
        return f"{about}: another answer than on the quiet server: {request.detail}"
    if request.took_s > request.deadline_s + LATE_S:
        return f"{about}: took {request.took_s:.1f} s, deadline {request.deadline_s:.1f} s"
    ended_s = request.started_s + request.took_s
    is_late = request.took_s >= request.deadline_s - EARLY_S
    if request.end == "OK" or (request.end in EXPIRED and is_late):
        return ""
    hit = {
        f.replica
        for f in faults
        if f.at_s <= ended_s and request.started_s <= f.recovered_s + AFTERMATH_S
    }
    if request.end in ALLOWED_AROUND_RESTARTS and hit:
        return ""
    if request.end == NO_REPLICA and hit == {f.replica for f in faults}:
        return ""
    return f"{about}: {request.end} after {request.took_s:.1f} s: {request.detail}"


def alarm_s(fault: Fault, samples: Iterable[HealthSample]) -> float:
    """Return the seconds from a fault to NOT_SERVING; infinite if its trouble ended before."""
    found = (s.at_s for s in samples if fault.at_s <= s.at_s <= fault.recovered_s and not s.serving)
    return next(found, math.inf) - fault.at_s


def all_clear_s(fault: Fault, samples: Iterable[HealthSample]) -> float:
    """Return the seconds from the end of trouble to SERVING; infinite if that never came."""
    found = (s.at_s for s in samples if s.at_s >= fault.recovered_s and s.serving)
    return next(found, math.inf) - fault.recovered_s


def find_silence(samples: Iterable[HealthSample]) -> Iterator[str]:
    """Yield a line if checks of the health were not answered."""
    silent = [sample.at_s for sample in samples if sample.serving is None]
    if silent:
        yield f"{silent[0]:.1f} s: {len(silent)} checks were not answered"


def find_late_alarms(faults: Iterable[Fault], samples: Sequence[HealthSample]) -> Iterator[str]:
    """Yield a line for each trouble that lasted too long before the replica reported it."""
    for fault in faults:
        if fault.recovered_s - fault.at_s <= ALARM_S:
            continue
        seconds = alarm_s(fault, samples)
        if seconds > ALARM_S:
            yield f"{fault.name}: NOT_SERVING after {seconds:.1f} s"


def find_false_health(faults: Iterable[Fault], samples: Sequence[HealthSample]) -> Iterator[str]:
    """Yield a line for each stop during which the replica reported SERVING after the alarm.

    Only stops that end with SIGCONT count: the instant at which a replacement can answer is not
    known exactly.
    """
    for fault in faults:
        if fault.signal != "SIGSTOP" or fault.replaced:
            continue
        start_s = fault.at_s + ALARM_S
        wrong = [s.at_s for s in samples if start_s < s.at_s < fault.recovered_s and s.serving]
        if wrong:
            yield f"{fault.name}: SERVING {wrong[0] - fault.at_s:.1f} s later ({len(wrong)} times)"


def quiet_periods(faults: Sequence[Fault]) -> Iterator[tuple[Fault, float]]:
    """Yield the faults whose trouble ended last, with the seconds until more trouble comes."""
    for fault in faults:
        later = [other for other in faults if other.recovered_s > fault.recovered_s]
        next_s = min((other.at_s for other in later), default=math.inf)
        if math.isfinite(fault.recovered_s) and next_s > fault.recovered_s:
            yield fault, next_s - fault.recovered_s


def find_late_all_clears(faults: Sequence[Fault], samples: Sequence[HealthSample]) -> Iterator[str]:
    """Yield a line for each end of trouble that the replica reported too late."""
    for fault, quiet_s in quiet_periods(faults):
        if quiet_s > ALL_CLEAR_S and all_clear_s(fault, samples) > ALL_CLEAR_S:
            yield f"{fault.name}: not SERVING {ALL_CLEAR_S:.0f} s after the end of trouble"


def find_false_alarms(faults: Sequence[Fault], samples: Iterable[HealthSample]) -> Iterator[str]:
    """Yield a line if the gateway reported NOT_SERVING while a replica had no trouble."""
    replicas = {f.replica for f in faults}
    wrong = [
        sample.at_s
        for sample in samples
        if sample.serving is False
        and any(_is_well(replica, faults, sample.at_s) for replica in replicas)
    ]
    if wrong:
        yield f"gateway: NOT_SERVING while a replica was well, {len(wrong)} times: {wrong[0]:.1f} s"


def _is_well(replica: int, faults: Iterable[Fault], at_s: float) -> bool:
    return not any(
        f.replica == replica and f.is_vital and f.at_s <= at_s <= f.recovered_s + ALL_CLEAR_S
        for f in faults
    )
