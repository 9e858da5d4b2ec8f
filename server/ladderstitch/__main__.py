"""`python -m ladderstitch`, the same as the `ladderstitch` command."""

from ladderstitch.cli import app

app(prog_name="ladderstitch")
