"""Options of commands that send load: which arrival process, and its times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from ladderstitch_loadtest.load import traces
from ladderstitch_loadtest.load.traces import Times

Process = Literal["poisson", "gamma", "ramp", "step", "replay"]
Arrivals = Annotated[
    Process,
    typer.Option(
        help="`ramp`: from a quarter of the rate to 7/4 of it and back; `step`: half of the "
        "rate, and 2.5 times it in the second quarter of the time."
    ),
]
Cv2 = Annotated[
    float, typer.Option(min=0, help="Squared variation of `gamma` gaps: 0 a clock, 8 bursts.")
]
ArrivalFile = Annotated[
    Path | None, typer.Option(help="CSV to `replay`: Azure's LLM format, or seconds.")
]


def arrival_times(
    arrivals: Process,
    rate: float,
    seconds: float,
    cv2: float,
    file: Path | None,
    rng: np.random.Generator,
) -> Times:
    """Raises `typer.BadParameter` for a file that cannot be read."""
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
                raise typer.BadParameter("--arrivals replay needs --file")
            try:
                return traces.replay(traces.read_arrivals(file), rate, seconds)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
