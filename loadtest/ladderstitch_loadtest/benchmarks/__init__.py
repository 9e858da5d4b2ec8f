"""Benchmarks of a server, a model or a link, each compared with a baseline."""
