"""Load tests, policy simulation, benchmarks and fault injection for ladderstitch servers.

A command starts the server that it needs, unless an address is given, and prints its figures.
With `--out FOLDER` it also writes NAME.json with the figures, the machine and the load.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from ladderstitch_loadtest.benchmarks import cli as benchmarks
from ladderstitch_loadtest.benchmarks.breakdown_cli import breakdown
from ladderstitch_loadtest.benchmarks.burst_cli import burst
from ladderstitch_loadtest.benchmarks.cascade_cli import cascade
from ladderstitch_loadtest.benchmarks.compiled_cli import compiled
from ladderstitch_loadtest.benchmarks.elastic_cli import elastic
from ladderstitch_loadtest.benchmarks.families_cli import families
from ladderstitch_loadtest.benchmarks.first_steps_cli import first_steps
from ladderstitch_loadtest.benchmarks.generation_cli import generation, path_changes
from ladderstitch_loadtest.benchmarks.language_peers_cli import language_peers
from ladderstitch_loadtest.benchmarks.overlap_cli import overlap
from ladderstitch_loadtest.benchmarks.own_networks_cli import own_networks
from ladderstitch_loadtest.benchmarks.peers_cli import peers
from ladderstitch_loadtest.faults import cli as faults
from ladderstitch_loadtest.faults.fuzz_cli import fuzz
from ladderstitch_loadtest.faults.loads_cli import loads
from ladderstitch_loadtest.faults.restarts_cli import restarts
from ladderstitch_loadtest.faults.soak_cli import soak
from ladderstitch_loadtest.faults.stops_cli import stops
from ladderstitch_loadtest.load.cli import run
from ladderstitch_loadtest.load.stream_cli import stream
from ladderstitch_loadtest.simulation import cli as simulation
from ladderstitch_loadtest.simulation.blocks_cli import blocks

PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Load": (run, stream),
    "Simulation": (
        simulation.compare,
        blocks,
        simulation.agree,
        simulation.decisions,
        simulation.replay,
    ),
    "Benchmarks": (
        benchmarks.overhead,
        peers,
        breakdown,
        cascade,
        compiled,
        benchmarks.switching,
        benchmarks.mixed,
        burst,
        benchmarks.hop,
        benchmarks.memory,
        benchmarks.real_sizes,
        benchmarks.smollm2,
        generation,
        language_peers,
        path_changes,
        elastic,
        overlap,
        families,
        first_steps,
        own_networks,
    ),
    "Faults": (faults.kills, faults.malformed, fuzz, loads, restarts, soak, stops),
}
"""The commands of each panel of the help page, in order; `_` in a name becomes `-`."""

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
