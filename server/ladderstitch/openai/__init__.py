"""An OpenAI-compatible HTTP face for language models, beside the gRPC one."""
