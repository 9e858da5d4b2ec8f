"""One replica: a process with models, servers and metrics; readiness, draining, load."""
