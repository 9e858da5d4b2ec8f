"""Killed processes, malformed requests, hours of mixed load."""
