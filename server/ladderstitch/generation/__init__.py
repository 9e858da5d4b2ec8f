"""Many callers share one language model: continuous batching, token budgets, paths to choose."""
