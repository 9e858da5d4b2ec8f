"""Scheduling of text requests: continuous batching on one language model, within token budgets."""
