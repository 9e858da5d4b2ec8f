"""Servers of their own process, for every test here."""

from __future__ import annotations

from tests.support.servers import client, oip, server

__all__ = ["client", "oip", "server"]
