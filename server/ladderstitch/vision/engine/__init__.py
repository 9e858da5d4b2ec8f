"""Runs one batch of images on one stitch, in a worker process or inline."""
