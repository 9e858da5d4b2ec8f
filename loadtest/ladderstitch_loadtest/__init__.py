"""Open-loop load generation and measurement against a running ladderstitch server."""
