"""Servers and models that a measurement starts for itself, and its result files."""
