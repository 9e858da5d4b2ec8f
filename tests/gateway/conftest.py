"""Fixtures of the gateway's tests."""

from __future__ import annotations

from tests.support.fake_replicas import start_gateway

__all__ = ["start_gateway"]
