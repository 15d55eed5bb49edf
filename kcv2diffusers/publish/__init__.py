"""Publishing a pipeline on the Hugging Face Hub: checks, model card, upload, Space."""
