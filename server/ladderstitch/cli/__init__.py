"""The `ladderstitch` command."""

from ladderstitch.cli.app import app

__all__ = ["app"]
