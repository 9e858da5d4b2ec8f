"""Fixtures of the tests of image scheduling."""

from __future__ import annotations

from tests.support.image_scheduling import clock

__all__ = ["clock"]
