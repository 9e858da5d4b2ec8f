"""A record of every planner input and decision as JSON lines, for replay.

The first line holds the model's quality and latency profile. Each further line is `[verb, ...]`, in
order of time. Times are seconds on the clock of the requests. `ladderstitch-loadtest replay` reads
the record.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Concatenate, ParamSpec, TextIO

from ladderstitch.scheduling.cascades import CascadeSet
from ladderstitch.scheduling.profiles import LatencyProfile
from ladderstitch.scheduling.requests import Deadlines, Pixels, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.policies.base import Decision, Defer

log = logging.getLogger(__name__)

RECORD_FORMAT = 1

Arguments = ParamSpec("Arguments")


def _ends_at_first_error(
    write: Callable[Concatenate[PlannerRecorder, Arguments], None],
) -> Callable[Concatenate[PlannerRecorder, Arguments], None]:
    """Return a method that writes to the record unless an earlier one has failed."""

    @functools.wraps(write)
    def guarded(
        recorder: PlannerRecorder, /, *args: Arguments.args, **kw: Arguments.kwargs
    ) -> None:
        if recorder.failed:
            return
        try:
            write(recorder, *args, **kw)
        except Exception as error:  # a full disk, a closed file: planning goes on without a record
            recorder.fail(error)

    return guarded


class PlannerRecorder:
    """The writer of one planner's record, which ends at the first error: no method raises.

    Requests have numbers in the file; their images are not written. The caller that opened the file
    closes it. `on_failure` is called once, at the first error, after which nothing is written: a
    record with a gap cannot be replayed.
    """

    def __init__(self, file: TextIO, on_failure: Callable[[], None] = lambda: None) -> None:
        self._file, self._on_failure = file, on_failure
        self.failed = False
        self._numbers: dict[Request, int] = {}
        self._next_number = count()

    def fail(self, error: Exception) -> None:
        """Log the error that ends the record."""
        self.failed = True
        self._numbers.clear()
        log.error("record ended, requests are still served: %s: %s", type(error).__name__, error)
        self._on_failure()

    @_ends_at_first_error
    def on_created(
        self, quality: Mapping[int, float], profile: LatencyProfile, cascades: CascadeSet
    ) -> None:
        """Write the first line: what the planner was created with."""
        model = {
            "quality": dict(quality),
            "profile": profile.model_dump(mode="json"),
            "temperatures": dict(cascades.temperatures),
            "cascades": [cascade.model_dump(mode="json") for cascade in cascades.cascades],
        }
        self._file.write(json.dumps({"format": RECORD_FORMAT} | model) + "\n")

    @_ends_at_first_error
    def on_configured(self, settings: SchedulerSettings) -> None:
        """Write the settings that apply from now on."""
        self._write("configure", settings.model_dump(mode="json"))

    @_ends_at_first_error
    def on_admission(self, request: Request, now: float, *, alone: bool, rejected: bool) -> None:
        """Write the result of an admission check."""
        self._write("admit", now, alone, rejected, *request_fields(request))

    @_ends_at_first_error
    def on_added(self, request: Request) -> None:
        """Write that a request was queued; number it."""
        self._write("add", self._number(request), *request_fields(request))

    @_ends_at_first_error
    def on_requeued(self, request: Request) -> None:
        """Write that a request was queued again; number it again."""
        self._write("put_back", self._number(request), *request_fields(request))

    @_ends_at_first_error
    def on_removed(self, request: Request) -> None:
        """Write that a request left the queue."""
        self._write("withdraw", self._numbers.pop(request))

    @_ends_at_first_error
    def on_expired(self, requests: Sequence[Request], now: float) -> None:
        """Write that requests left the queue for their hard deadlines."""
        self._write("expire", now, [self._numbers.pop(request) for request in requests])

    @_ends_at_first_error
    def on_decision(self, choice: Decision | Defer, now: float) -> None:
        """Write a decision of the policy."""
        if isinstance(choice, Defer):
            self._write("hold", now, choice.seconds)
        else:
            numbers = [self._numbers.pop(request) for request in choice.requests]
            cascade = [] if choice.cascade is None else [choice.cascade.first]
            self._write("decide", now, choice.variant, numbers, *cascade)

    @_ends_at_first_error
    def on_batch_started(
        self, batch_size: int, variant: int, now: float, expected_s: float | None
    ) -> None:
        """Write the start of a batch; of a cascade also its expected seconds."""
        more = () if expected_s is None else (expected_s,)
        self._write("started", batch_size, variant, now, *more)

    @_ends_at_first_error
    def on_batch_finished(
        self, variant: int, batch_size: int, compute_s: float, total_s: float
    ) -> None:
        """Write the end of a batch that was answered."""
        self._write("finished", variant, batch_size, compute_s, total_s)

    @_ends_at_first_error
    def on_engine_idle(self, *, flush: bool) -> None:
        """Write that the engine is idle, and flush the file if `flush` is set."""
        self._write("free")
        if flush:
            self._file.flush()

    def _number(self, request: Request) -> int:
        number = self._numbers[request] = next(self._next_number)
        return number

    def _write(self, verb: str, *values: object) -> None:
        self._file.write(json.dumps([verb, *values]) + "\n")


def request_fields(request: Request) -> list[Any]:
    """Return the fields of a request that planning depends on, for `request_from_fields`."""
    deadlines = request.deadlines
    return [
        request.arrival,
        deadlines.soft,
        deadlines.hard,
        request.num_images,
        request.min_quality,
        request.variant,
        request.priority,
        request.min_confidence,
    ]


def request_from_fields(fields: Sequence[Any], images: Pixels) -> Request:
    """Return a request with recorded fields; `images` has their number of images, B."""
    arrival, soft, hard, _, *others = fields  # records of older servers have no minimum confidence
    deadlines = Deadlines(soft, hard, "record", "record")
    return Request("", images, arrival, deadlines, *others)
