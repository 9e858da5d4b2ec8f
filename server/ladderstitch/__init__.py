"""Serve elastic models under latency budgets.

One set of weights holds many networks, the variants of a model. The server answers every request
with the most accurate variant that meets the request's latency budget.
"""

__version__ = "0.1.0"
