"""Policies: which requests run next, together, on which stitch."""
