"""The command line `ladderstitch`."""

from ladderstitch.cli.app import app

__all__ = ["app"]
