"""Nouns that both schedulers share: requests, profiles, candidates, latency model, settings."""
