"""Training steps on a CUDA device that is not there: fake tensors "on cuda:0", with shapes and no values.

    LD_PRELOAD=libguard.so python step.py

A line of the standard input is a request, ['{"precision": "mixed_bfloat16", ...}'] in JSON. The answer of a
fork is a line of JSON: what waited for the device (`waits`), what was copied to it (`copies`), each with the
line that did it, the number of operations of each phase (`operations`), and what pictures and kernels are
copied or turned round on the device (`moves`). The fake stands in for a GPU, which the tests do not have;
what a kernel computes, and which one PyTorch chooses, it cannot show.
"""

import collections
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"KERAS_BACKEND": "torch", "KERAS_TORCH_DEVICE": "cuda:0"}
sys.modules["jax"] = None

import keras  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from kcv2diffusers import models  # noqa: E402
from kcv2diffusers.dreambooth import torch_updates  # noqa: E402
from kcv2diffusers.dreambooth.config import Config  # noqa: E402
from kcv2diffusers.dreambooth.lora import add_lora, store_frozen_as_computed  # noqa: E402
from kcv2diffusers.dreambooth.model import DreamBooth  # noqa: E402
from kcv2diffusers.dreambooth.optimizers import make_optimizer  # noqa: E402
from kcv2diffusers.dreambooth.torch_step import TorchStep  # noqa: E402
from kcv2diffusers.models.layers import dtype_policy, zeros  # noqa: E402

VIEWS = {
    "view", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze",
    "_unsafe_view", "detach", "alias", "as_strided", "unbind", "empty", "empty_like", "split",
    "empty_strided", "lift_fresh", "reshape", "_reshape_alias", "new_empty", "is_same_size",
    "split_with_sizes", "chunk",
}  # fmt: skip


def line() -> str:
    """The line of this package, or of Keras, that is running."""
    frames = traceback.extract_stack()
    ours = [frame for frame in frames if "kcv2diffusers/" in frame.filename]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"


def is_picture(x: object) -> bool:
    """Whether it is a tensor of four axes: pictures or kernels of convolutions."""
    return isinstance(x, torch.Tensor) and x.dim() == 4


class Watch(TorchDispatchMode):
    """Counts operations, and notes each that waits for the device or copies to it."""

    def __init__(self):
        super().__init__()
        self.phase, self.counts = "", collections.Counter()
        self.waits, self.copies = [], []
        self.moves = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket).removeprefix("aten.")
        if name == "_local_scalar_dense":
            self.waits.append(f"{self.phase}: {line()}")
            return {torch.bool: True, torch.int32: 1, torch.int64: 1}.get(args[0].dtype, 0.5)
        result = func(*args, **(kwargs or {}))
        if name not in VIEWS and not name.startswith("prim."):
            self.counts[self.phase] += 1
        if name in ("_to_copy", "copy_", "clone") and is_picture(result):
            self.moves["copies"] += 1  # casts too
        if name in ("convolution", "convolution_backward"):
            # What cuDNN's convolutions would turn round before they start.
            turned = [not x.is_contiguous(memory_format=torch.channels_last) for x in args if is_picture(x)]
            self.moves["turned"] += sum(turned)
        if name in ("_to_copy", "copy_", "clone"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type == "cpu" and result.device.type == "cuda":
                self.copies.append(f"{self.phase}: {line()}")
        return result


def step(options: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    # A CPU build cannot choose among CUDA's attention kernels: flash attention, as for 16 bits.
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if q.dtype == torch.float32:
            return efficient(q, k, v, attn_mask, True, 0.0, is_causal, scale=scale)[0]
        return flash(q, k, v, 0.0, is_causal, False, scale=scale)[0]

    torch.nn.functional.scaled_dot_product_attention = attention
    keras.initializers.HeUniform.__call__ = lambda self, shape, dtype=None: keras.ops.zeros(shape, dtype)
    plant = options.pop("plant", False)
    lora, precision = options.pop("lora", 0), options.pop("precision", "mixed_bfloat16")
    config = models.UNetConfig(widths=(32, 64), heads=(2, 2), context_width=48, gelu="exact", blocks=1)
    with FakeTensorMode(allow_non_fake_inputs=True), zeros():
        with dtype_policy(precision):
            unet = models.build_unet(config)
            if lora:
                add_lora(unet, lora, lora)
                store_frozen_as_computed(unet)
            model = DreamBooth(unet, snr_gamma=5.0)
        model.compile(make_optimizer(Config(learning_rate=1e-6, **options), ()), jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        taken = TorchStep(model)
        taken.gradients = [torch.empty_like(variable.value) for variable in taken.variables]
        rng = np.random.default_rng(0)
        batch = {
            "latents": rng.standard_normal((2, 8, 8, 4), dtype="float32"),
            "noise": rng.standard_normal((2, 8, 8, 4), dtype="float32"),
            "timesteps": rng.integers(0, 1000, 2).astype("int32"),
            "condition": rng.standard_normal((2, 77, 48), dtype="float32"),
            "prior": np.zeros(2, "float32"),
        }
        on_device = {name: torch.from_numpy(value).to("cuda:0") for name, value in batch.items()}
        # To ask the device would wait for it, once before the first step.
        getattr(model.optimizer, "inner_optimizer", model.optimizer).counted = 0
        model.optimizer.good_steps = 0
        with Watch() as watch:
            watch.phase = "gradients"
            taken.into_gradients(on_device)
            if plant:  # what the test of this file looks for
                float(taken.gradients[0].sum())
                torch.ones(3).to("cuda:0")
            watch.phase = "update"
            torch_updates.update(model.optimizer, taken.gradients, taken.variables)
    kernels = sum(len(variable.shape) > 1 for variable in taken.variables)
    found = {"waits": watch.waits, "copies": watch.copies, "operations": watch.counts, "kernels": kernels}
    return {**found, "moves": watch.moves}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for request in sys.stdin:
        child = os.fork()
        if not child:
            try:
                answer: Any = step(json.loads(*json.loads(request)))
            except BaseException:
                answer = traceback.format_exc()
            print(json.dumps(answer), file=answers, flush=True)
            os._exit(0)
        if status := os.waitpid(child, 0)[1]:
            print(json.dumps(f"the fork ended with {status}"), file=answers, flush=True)


main()
