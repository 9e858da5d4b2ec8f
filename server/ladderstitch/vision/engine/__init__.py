"""Engines of image models: one batch on one stitch, in a worker process or inline."""
