"""The frameworks: what the conversion does without, and how little XLA should do."""

HEAVY = ("tensorflow", "keras", "torch", "diffusers", "transformers", "keras_cv", "jax", "huggingface_hub")

# The compiler's own work takes longer than what it saves.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
