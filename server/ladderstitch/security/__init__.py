"""Who may call, and how much: TLS that rotates, bearer tokens with scopes, limits per token."""
