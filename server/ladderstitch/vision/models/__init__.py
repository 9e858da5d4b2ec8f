"""Stitchable networks: routes, anchors, families and the executor."""
