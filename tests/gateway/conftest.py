from __future__ import annotations

from tests.support.fake_replicas import fleet

__all__ = ["fleet"]
