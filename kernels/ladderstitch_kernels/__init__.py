"""Triton kernels of ladderstitch and their torch references; imports torch and triton only."""
