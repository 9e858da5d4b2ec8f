"""Stitchable networks: routes, anchors, families, the executor."""
