"""Published checkpoints and data as bundles, and checks against the original implementations."""
