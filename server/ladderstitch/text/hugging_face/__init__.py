"""Model folders of Hugging Face's transformers, which are served as they are."""
