"""Entry point of `python -m ladderstitch`, which is the `ladderstitch` command."""

from ladderstitch.cli import app

app(prog_name="ladderstitch")
