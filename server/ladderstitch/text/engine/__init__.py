"""The ranks of one language model: their processes, their messages and the group that runs them."""
