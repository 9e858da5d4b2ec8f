"""Ladder-Residual transformers: one Llama architecture, split over ranks."""
