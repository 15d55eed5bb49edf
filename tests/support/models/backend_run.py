"""Run in a process of its own, under the KERAS_BACKEND of its environment: every model on fixed inputs.

`python backend_run.py OUT.npz` writes what each model computes, the gradients of the UNet with and without
rematerialisation and, on JAX, what attention keeps for them; it fails if a backend or keras-cv was imported
that nobody asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kcv2diffusers import models
from kcv2diffusers.models.layers import attention

UNET = models.UNetConfig(widths=(32, 64), heads=(2, 4), context_width=24, blocks=1, norm_groups=8)
TEXT = models.TextEncoderConfig(width=24, layers=2, heads=4, vocabulary=50)
VAE = models.VAEConfig(widths=(16, 32), norm_groups=8)
RNG = np.random.default_rng(0)


def randomise(model: keras.Model) -> None:
    """As `stack.randomise`, which is not used here because `stack` imports keras-cv."""
    for variable in model.weights:
        noise = RNG.standard_normal(variable.shape, dtype="float32")
        scale = 1 / np.sqrt(np.prod(variable.shape[:-1])) if len(variable.shape) > 1 else 0.1
        variable.assign(noise * scale + float(variable.path.endswith("gamma")))


def run() -> dict[str, Any]:
    tokens = RNG.integers(0, 50, (2, 9)).astype("int32")
    unet_inputs = {
        "latent": RNG.standard_normal((2, 8, 16, 4), dtype="float32"),
        "timestep_embedding": RNG.standard_normal((2, 32), dtype="float32"),
        "context": RNG.standard_normal((2, 9, 24), dtype="float32"),
    }
    latents = RNG.standard_normal((2, 8, 16, 4), dtype="float32")
    pictures = RNG.uniform(-1, 1, (2, 32, 64, 3)).astype("float32")
    results: dict[str, Any] = {}
    positions = np.tile(np.arange(9, dtype="int32"), (2, 1))
    for name, model, inputs in [
        ("text", models.build_text_encoder(TEXT), {"tokens": tokens, "positions": positions}),
        ("decoder", models.build_decoder(VAE), latents),
        ("encoder", models.build_image_encoder(VAE), pictures),
        ("unet", models.build_unet(UNET), unet_inputs),
    ]:
        randomise(model)
        # TensorFlow takes longer to trace a model than to compute it step by step.
        on_tensorflow = keras.backend.backend() == "tensorflow"
        output = model(inputs) if on_tensorflow else model.predict_on_batch(inputs)
        results[name] = keras.ops.convert_to_numpy(output)
    for name, remat in (("kept", False), ("recomputed", True)):
        models.rematerialise(model, remat)
        found = gradients(model, unet_inputs, traced=remat)
        for variable, gradient in zip(model.trainable_variables, found, strict=True):
            results[f"gradient-{name}/{variable.path}"] = keras.ops.convert_to_numpy(gradient)
    if keras.backend.backend() == "jax":
        results["scores"] = np.array(scores_at_once())
    return results


def scores_at_once(length: int = 512, layers: int = 8) -> float:
    """How many matrices of (length, length) a backward pass through `layers` attentions has room for."""
    import jax

    def loss(x: Any) -> Any:
        for _ in range(layers):
            x = attention(x, x, x, heads=1)
        return mean_square(x)

    compiled = jax.jit(jax.grad(loss)).lower(np.ones((1, length, 8), "float32")).compile()
    return float(compiled.memory_analysis().temp_size_in_bytes) / (4 * length**2)


def mean_square(output: Any) -> Any:
    return keras.ops.mean(output**2)


def gradients(
    model: keras.Model,
    inputs: dict[str, Any],
    loss: Callable[[Any], Any] = mean_square,
    traced: bool = True,
) -> list[Any]:
    """Gradients of `loss` of the model's output, one for each trainable variable.

    On TensorFlow of a traced function, or else of each operation as it is called.
    """
    inputs = {name: keras.ops.convert_to_tensor(value) for name, value in inputs.items()}
    if keras.backend.backend() == "torch":
        model.zero_grad()
        loss(model(inputs)).backward()
        return [variable.value.grad.detach() for variable in model.trainable_variables]
    values = [variable.value for variable in model.trainable_variables]
    if keras.backend.backend() == "jax":
        import jax

        fixed = [variable.value for variable in model.non_trainable_variables]
        compute = jax.grad(lambda values: loss(model.stateless_call(values, fixed, inputs)[0]))
        return list(jax.jit(compute)(values))
    import tensorflow as tf

    def step() -> Any:
        with tf.GradientTape() as tape:
            value = loss(model(inputs))
        return tape.gradient(value, values)

    return list((tf.function(step) if traced else step)())


if __name__ == "__main__":
    backend = os.environ["KERAS_BACKEND"]
    assert keras.backend.backend() == backend
    np.savez(sys.argv[1], **{name.replace("/", "|"): value for name, value in run().items()})
    unasked = {"keras_cv", "tensorflow"} - {backend}
    assert not unasked & set(sys.modules), f"imported without being asked for: {unasked & set(sys.modules)}"
