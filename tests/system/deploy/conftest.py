"""Fixtures of the deployment's system tests."""

from __future__ import annotations

from tests.deploy.conftest import helm, kubectl

__all__ = ["helm", "kubectl"]
