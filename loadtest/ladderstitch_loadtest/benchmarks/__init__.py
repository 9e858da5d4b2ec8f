"""Measurements of a server, a model or a link, side by side with something else."""
