"""Imports of published checkpoints and data, and checks against original implementations."""
