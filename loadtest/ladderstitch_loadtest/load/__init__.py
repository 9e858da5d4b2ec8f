"""Open-loop load on a running server: arrival traces, requests, streams and reports."""
