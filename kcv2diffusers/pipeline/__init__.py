"""What stands around the weights in a diffusers pipeline: configs, scheduler, tokenizer, provenance."""
