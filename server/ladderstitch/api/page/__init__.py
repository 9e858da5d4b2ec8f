"""The page at `/` of the HTTP port: its files, and the JSON that it asks for."""
