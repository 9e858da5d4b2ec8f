"""What both schedulers share: requests, profiles, candidates, latency model, settings."""
