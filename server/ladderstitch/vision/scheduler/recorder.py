"""A planner that writes down all that it is told and decides, so that both can be had again.

A line of JSON each: first what the planner was made of, then `[verb, ...]` in order. Times are
seconds on the clock of the requests. `ladderstitch-loadtest replay` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from typing import Any, TextIO

from ladderstitch.errors import RequestError
from ladderstitch.scheduling.profiles import LatencyProfile
from ladderstitch.scheduling.requests import Deadlines, Pixels, Request
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.vision.scheduler.planner import Planner
from ladderstitch.vision.scheduler.policies.base import Decision, Defer

FORMAT = 1


class RecordingPlanner(Planner):
    """A `Planner`; requests bear numbers in the file, what they hold is not written.

    The file is flushed whenever nothing is left to do; whoever opened it closes it.
    """

    def __init__(
        self,
        quality: Mapping[int, float],
        profile: LatencyProfile,
        settings: SchedulerSettings,
        file: TextIO,
    ) -> None:
        self._file = file
        self._numbers: dict[Request, int] = {}
        self._next = count()
        made_of = {"quality": dict(quality), "profile": profile.model_dump(mode="json")}
        file.write(json.dumps({"format": FORMAT} | made_of) + "\n")
        super().__init__(quality, profile, settings)

    def configure(self, settings: SchedulerSettings) -> None:
        super().configure(settings)
        self._write("configure", settings.model_dump(mode="json"))

    def admit(self, request: Request, now: float, *, alone: bool) -> None:
        try:
            super().admit(request, now, alone=alone)
        except RequestError:
            self._write("admit", now, alone, True, *fields(request))
            raise
        self._write("admit", now, alone, False, *fields(request))

    def add(self, request: Request) -> None:
        super().add(request)
        self._write("add", self._number(request), *fields(request))

    def requeue(self, request: Request) -> None:
        super().requeue(request)
        self._write("put_back", self._number(request), *fields(request))

    def remove(self, request: Request) -> None:
        super().remove(request)
        self._write("withdraw", self._numbers.pop(request))

    def take_expired(self, now: float) -> list[Request]:
        expired = super().take_expired(now)
        if expired:
            self._write("expire", now, [self._numbers.pop(request) for request in expired])
        return expired

    def decide(self, now: float) -> Decision | Defer:
        choice = super().decide(now)
        if isinstance(choice, Defer):
            self._write("hold", now, choice.seconds)
        else:
            numbers = [self._numbers.pop(request) for request in choice.requests]
            self._write("decide", now, choice.variant, numbers)
        return choice

    def started(self, batch_size: int, variant: int, now: float) -> None:
        super().started(batch_size, variant, now)
        self._write("started", batch_size, variant, now)

    def finished(self, variant: int, batch_size: int, compute_s: float, total_s: float) -> float:
        error = super().finished(variant, batch_size, compute_s, total_s)
        self._write("finished", variant, batch_size, compute_s, total_s)
        return error

    def free(self) -> None:
        super().free()
        self._write("free")
        if not self.queue:
            self._file.flush()

    def _number(self, request: Request) -> int:
        number = self._numbers[request] = next(self._next)
        return number

    def _write(self, verb: str, *told: object) -> None:
        self._file.write(json.dumps([verb, *told]) + "\n")


def fields(request: Request) -> list[Any]:
    """What planning knows of a request; `request_of` makes one of it."""
    deadlines = request.deadlines
    return [
        request.arrival,
        deadlines.soft,
        deadlines.hard,
        request.num_images,
        request.min_quality,
        request.variant,
        request.priority,
    ]


def request_of(told: list[Any], images: Pixels) -> Request:
    """`images` is of as many batch_size as were told, whatever it shows."""
    arrival, target, limit, _, min_quality, variant, priority = told
    deadlines = Deadlines(target, limit, "record", "record")
    return Request("", images, arrival, deadlines, min_quality, variant, priority)
