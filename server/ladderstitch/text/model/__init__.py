"""The forward pass of one rank: weights, residual schemes, paged cache."""
