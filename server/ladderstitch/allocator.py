"""Makes a long-lived process give memory back after a large picture."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MIB = 1 << 20


def return_freed_memory() -> None:
    """Fix glibc's thresholds, which otherwise rise with the largest block ever freed.

    After one picture of 50 megapixels the heap would keep hundreds of MiB for good. Other C
    libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MIB)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * MIB)
        libc.mallopt(M_ARENA_MAX, 2)
