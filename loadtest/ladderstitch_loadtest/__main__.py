"""Entry point of `python -m ladderstitch_loadtest`."""

from ladderstitch_loadtest.cli import app

app(prog_name="ladderstitch-loadtest")
