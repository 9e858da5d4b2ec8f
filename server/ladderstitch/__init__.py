"""Serve elastic models under latency budgets.

One set of weights holds many networks (stitches); every request is answered by the best one that
its latency budget allows.
"""

__version__ = "0.1.0"
