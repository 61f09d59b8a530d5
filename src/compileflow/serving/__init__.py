"""What a service loads: the compiled tokenizer, model and pipeline."""
