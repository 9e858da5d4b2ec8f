"""Imports the kernels so that they run in Triton's interpreter.

Triton chooses it when it is imported, which any library that a test imports may do: this module is
the first import of the whole test run.
"""

from __future__ import annotations

import os

VARIABLE = "TRITON_INTERPRET"

_before = os.environ.get(VARIABLE)
os.environ[VARIABLE] = "1"
import ladderstitch_kernels  # noqa: E402, F401  (its kernels become interpreted on this import)

if _before is None:
    del os.environ[VARIABLE]
