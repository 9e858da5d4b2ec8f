"""Open-loop load on a running server: traces, requests, streams, reports."""
