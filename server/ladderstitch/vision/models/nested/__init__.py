"""Nested networks (supernets): every path is a prefix of the largest network's weights."""
