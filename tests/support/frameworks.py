"""What the conversion does without."""

HEAVY = ("tensorflow", "keras", "torch", "diffusers", "transformers", "keras_cv", "jax", "huggingface_hub")
