"""Simulation of policies on traces: simulator, oracle, policy sweep, replay of records."""
