"""Policies on simulated traces: simulator, oracle, comparison, replay."""
