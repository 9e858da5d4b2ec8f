"""The command line as a whole: which commands there are, and the panels of the help page."""

from __future__ import annotations

from typer.main import get_command
from typer.testing import CliRunner

from ladderstitch_loadtest.cli import PANELS, app

NAMES = [
    "agree",
    "blocks",
    "breakdown",
    "burst",
    "cascade",
    "compare",
    "compiled",
    "decisions",
    "elastic",
    "families",
    "first-steps",
    "fuzz",
    "generation",
    "hop",
    "kills",
    "language-peers",
    "loads",
    "malformed",
    "memory",
    "mixed",
    "overhead",
    "overlap",
    "own-networks",
    "path-changes",
    "peers",
    "real-sizes",
    "replay",
    "restarts",
    "run",
    "smollm2",
    "soak",
    "stops",
    "stream",
    "switching",
]


def test_every_command_is_in_one_panel_of_the_help_page() -> None:
    names = get_command(app).commands  # type: ignore[attr-defined] # a group
    assert sorted(names) == NAMES
    page = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    places = [page.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places)
