"""Security of servers: listening addresses, certificate files, tokens and rate limits."""
