"""Language models: bundle, tokenizer, scheduler, ranks, forward pass and communicators."""
