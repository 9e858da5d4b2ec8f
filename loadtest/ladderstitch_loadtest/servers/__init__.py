"""Servers and models that measurements start for themselves, and where results go."""
