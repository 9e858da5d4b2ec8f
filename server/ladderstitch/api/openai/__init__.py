"""OpenAI's API over HTTP, for language models."""
