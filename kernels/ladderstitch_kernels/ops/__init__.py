"""Ops of a single rank."""
