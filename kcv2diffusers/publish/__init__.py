"""A pipeline on its way to the Hugging Face Hub: checks, model card, upload, Space."""
