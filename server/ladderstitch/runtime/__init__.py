"""Services of the machine and the process: device, memory, ports, versions."""

from collections.abc import Callable

ProgressCallback = Callable[[int, int], None]
"""Function that a long task calls with the finished and the total number of its parts."""
