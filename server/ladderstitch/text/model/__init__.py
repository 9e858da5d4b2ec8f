"""The model of one rank: configuration, weights, cache, residual schemes and forward pass."""
