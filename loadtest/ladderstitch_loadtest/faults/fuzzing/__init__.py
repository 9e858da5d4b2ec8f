"""Fuzzing of a server: mutated requests of every entrance, and a verdict on each answer."""
