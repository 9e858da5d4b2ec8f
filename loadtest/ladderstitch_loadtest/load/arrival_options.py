"""Options that choose an arrival process, and the arrival times that it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from ladderstitch_loadtest.load import traces
from ladderstitch_loadtest.load.traces import Times

ArrivalProcess = Literal["poisson", "gamma", "ramp", "step", "replay"]
Arrivals = Annotated[
    ArrivalProcess,
    typer.Option(
        help="Arrival process. `ramp` goes from 1/4 of the rate to 7/4 of it and back. `step` has "
        "half of the rate, and 2.5 times the rate in the second quarter of the run."
    ),
]
Cv2 = Annotated[
    float,
    typer.Option(
        min=0,
        help="Squared coefficient of variation of `gamma` gaps: 0 is a clock, 8 is bursty.",
    ),
]
ArrivalFile = Annotated[
    Path | None,
    typer.Option(help="CSV file for `replay`: Azure's LLM trace format, or one column of seconds."),
]


def arrival_times(
    arrivals: ArrivalProcess,
    rate: float,
    seconds: float,
    cv2: float,
    file: Path | None,
    rng: np.random.Generator,
) -> Times:
    """Return arrival times of the chosen process, in seconds from the start, ascending.

    `rate` is the mean in requests/s. Raises `typer.BadParameter` if `replay` has no file or one
    that cannot be read.
    """
    match arrivals:
        case "poisson":
            return traces.poisson(rate, seconds, rng)
        case "gamma":
            return traces.gamma(rate, cv2, seconds, rng)
        case "ramp":
            return traces.ramp(rate / 4, 7 * rate / 4, seconds, rng)
        case "step":
            return traces.step(rate / 2, 2.5 * rate, seconds / 4, seconds / 2, seconds, rng)
        case "replay":
            if file is None:
                raise typer.BadParameter("--file: expected a CSV file for --arrivals replay")
            try:
                return traces.replay(traces.read_arrivals(file), rate, seconds)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
