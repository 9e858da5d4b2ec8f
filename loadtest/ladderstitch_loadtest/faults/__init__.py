"""Fault injection: killed processes, malformed requests, hours of mixed load."""
