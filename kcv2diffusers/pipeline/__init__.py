"""The files of a diffusers pipeline other than weights: configs, scheduler, tokenizer, provenance."""
