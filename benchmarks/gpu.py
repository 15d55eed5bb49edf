"""Training on one GPU, ours beside diffusers, in one short run on a bare machine.

    python benchmarks/gpu.py --wheels DIR          # with a network: fetch what a bare machine lacks
    python benchmarks/gpu.py --out DIR [--seconds 480] [--only "NAME LORA BATCH" ...] [--list]
    python benchmarks/gpu.py --table ROWS.jsonl    # the rows of a run as a table

The machine needs Python 3.12, PyTorch and JAX for its GPU, transformers, peft, h5py and safetensors, and
the wheels on its PYTHONPATH. Every row is a process with a time limit. DIR/rows.jsonl has each row as soon
as it is measured. What does not fit into `--seconds` is left out, the least valuable rows first.

The rows that time nothing come first and side by side: a run of DreamBooth on the tiny base, stopped,
resumed, exported and verified, and the compilation of the programs that compile, which leaves them in a
cache. Then each row is timed alone. A step is what each trainer does for a batch of photos at SD1's sizes in
bfloat16: ours has encoded photos and prompts before; diffusers' runs the VAE's encoder and the text encoder
in every step, as its scripts do. Neither waits for its loss. Weights and pictures are random.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WHEELS = ("keras", "diffusers", "namex", "optree", "numkong", "google-crc32c", "importlib_metadata")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


@dataclass(frozen=True)
class Row:
    """One thing to measure. `value` orders them: what has the least is left out first. `limit` in seconds."""

    name: str
    kind: str
    mode: str = ""
    backend: str = "torch"
    lora: int = 0
    batch: int = 1
    value: int = 0
    limit: int = 60
    warm: int = 0  # seconds that compiling may take, before and beside the others

    @property
    def alone(self) -> bool:
        return self.kind not in ("tiny", "flops")


def rows() -> list[Row]:
    """All of them, the most valuable first."""
    found = [Row("tiny", "tiny", value=100, limit=230), Row("micro", "micro", value=90, limit=45)]
    for lora, batch, value in ((0, 1, 60), (0, 4, 50), (4, 4, 30), (4, 1, 10)):
        what = {"lora": lora, "batch": batch}
        found += [
            Row("ours recorded", "ours", "recorded snapshot profile", value=value + 9, limit=80, **what),
            Row("ours jax", "ours", "jit", "jax", value=value + 6, warm=240, **what),
            Row("ours eager", "ours", "eager", value=value + 5, **what),
            Row("diffusers eager", "diffusers", "eager", value=value + 7, **what),
            Row("diffusers compiled", "diffusers", "compiled", value=value + 8, limit=80, warm=240, **what),
        ]
    return sorted(found, key=lambda row: -row.value)


class Run:
    """Rows in processes of their own, and the file of what they found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.end = arguments, time.monotonic() + arguments.seconds
        self.out = arguments.out.absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self.failed: set[Row] = set()

    def left(self) -> float:
        return self.end - time.monotonic()

    def start(self, row: Row, warm: bool = False) -> subprocess.Popen[str]:
        cache = self.out.parent / "gpu-cache"
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {
            **os.environ,
            "KERAS_BACKEND": row.backend,
            "PYTHONPATH": path,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps(row.__dict__)]
        return subprocess.Popen(
            [*command, "--warm"] if warm else command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(
        self, row: Row, child: subprocess.Popen[str], limit: float, started: float, warm: bool = False
    ) -> None:
        try:
            out, errors = child.communicate(timeout=max(1.0, limit - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            out, errors = child.communicate()
            errors += f"\nstopped after {time.monotonic() - started:.0f} s"
        lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
        found = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"failed": errors[-1500:]}
        if not lines:
            self.failed.add(row)
        found["seconds"] = round(time.monotonic() - started, 1)
        with (self.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"row": row.__dict__, "warm": warm, "found": found}) + "\n")
        shown = json.dumps({key: value for key, value in found.items() if key != "kernels"})
        what = f"{row.name} {row.lora} {row.batch}{' (compiling)' if warm else ''}"
        print(f"{what}: {shown[-700:]}", flush=True)

    def together(self, chosen: list[Row], count: int) -> None:
        """Rows that time nothing, and compilations, `count` of these at a time."""
        waiting = [row for row in chosen if not row.alone or row.warm]
        running: dict[Row, tuple[subprocess.Popen[str], float]] = {}
        until = time.monotonic() + self.arguments.warm_seconds
        while waiting or running:
            while (
                waiting
                and (not waiting[0].alone or sum(r.alone for r in running) < count)
                and time.monotonic() < until - 30
            ):
                row = waiting.pop(0)
                running[row] = (self.start(row, warm=row.alone), time.monotonic())
            if waiting and not running:
                for row in waiting:
                    self.failed.add(row)
                    print("not compiled in time:", row.name, row.lora, row.batch, flush=True)
                return
            for row, (child, started) in list(running.items()):
                limit = min(row.warm if row.alone else row.limit, until - started, self.end - started)
                if child.poll() is not None or time.monotonic() - started > limit:
                    del running[row]
                    self.finish(row, child, limit, started, warm=row.alone)
            time.sleep(0.2)

    def all(self) -> None:
        names = self.arguments.only
        chosen = [row for row in rows() if not names or f"{row.name} {row.lora} {row.batch}" in names]
        self.together(chosen, self.arguments.together or gigabytes() // 22)
        for row in chosen:
            if not row.alone or row in self.failed:
                continue
            if self.left() < 12:
                print("left out:", row.name, row.lora, row.batch, flush=True)
                continue
            started = time.monotonic()
            self.finish(row, self.start(row), min(row.limit, self.left()), started)


def gigabytes() -> int:
    """Of the GPU's memory; where there is no GPU, to try the script, one program's worth."""
    if shutil.which("nvidia-smi") is None:
        return 40
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) // 1024


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    row = Row(**json.loads(arguments.worker))
    faulthandler.dump_traceback_later((row.warm if arguments.warm else row.limit) - 15)
    if row.kind == "tiny":
        return tiny(arguments)
    if row.kind == "micro":
        return {} if arguments.cpu else micro()
    if row.backend != "jax":
        sys.modules["jax"] = None  # type: ignore[assignment]
    return steps(row, arguments)


def steps(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps a second, and what they take of the device's memory."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    if row.backend == "torch":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    begun = time.perf_counter()
    step, wait = {"ours": ours, "diffusers": diffusers}[row.kind](row, arguments)
    built = time.perf_counter() - begun
    begun = time.perf_counter()
    step()
    wait()
    found: dict[str, Any] = {"built": round(built, 1), "first": round(time.perf_counter() - begun, 1)}
    if arguments.warm:
        return found
    for _ in range(4):
        step()
    wait()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 4 or (len(times) < 12 and time.perf_counter() - begun < 6):
        at = time.perf_counter()
        for _ in range(4):
            step()
        wait()
        times.append((time.perf_counter() - at) / 4)
    found |= {
        "steps/s": round(1 / statistics.median(times), 3),
        "best": round(1 / min(times), 3),
        "n": 4 * len(times),
    }
    found |= {f"GB {k}": round(v / 1e9, 2) for k, v in memory(row.backend, arguments.cpu).items()}
    host = time.process_time()
    at = time.perf_counter()
    for _ in range(4):
        step()
    found["host ms"] = round((time.perf_counter() - at) / 4e-3, 1)  # until the step is given to the device
    found["cpu ms"] = round((time.process_time() - host) / 4e-3, 1)
    wait()
    if "snapshot" in row.mode:
        found |= snapshot(step, wait)
    if "profile" in row.mode:
        print("RESULT", json.dumps(found), flush=True)
        found |= profile(step, wait, arguments.cpu)
    return found


def snapshot(step: Any, wait: Step) -> dict[str, Any]:
    """What a checkpoint's copy costs: the first, which makes room for it, and a later one. `host` is until
    the next step may begin, `steps` until four of them are done, beside `without` a copy, in milliseconds.
    """
    from kcv2diffusers.dreambooth.snapshots import Snapshots

    model = step.func.model
    snapshots = Snapshots([*model.trainable_variables, *model.optimizer.variables])
    found: dict[str, Any] = {"snapshot GB": round(snapshots.bytes / 1e9, 2), "fits": snapshots.fits()}
    for name in ("first copy", "copy", "without"):
        at = time.perf_counter()
        taken = snapshots.take() if name != "without" else None
        host = time.perf_counter() - at
        for _ in range(4):
            step()
        wait()
        times = {"host": host, "steps": time.perf_counter() - at}
        found[name] = {k: round(1e3 * v, 1) for k, v in times.items()}
        if taken is not None:
            taken()
    return found


def memory(backend: str, cpu: bool) -> dict[str, float]:
    if cpu:
        import resource

        return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e3}
    if backend == "jax":
        import jax

        return {"peak": float(jax.devices()[0].memory_stats()["peak_bytes_in_use"])}
    import torch

    return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


Step = Callable[[], object]


def ours(row: Row, arguments: argparse.Namespace) -> tuple[Step, Step]:
    import numpy as np

    from kcv2diffusers import models
    from kcv2diffusers.dreambooth.config import Config
    from kcv2diffusers.dreambooth.lora import add_lora, store_frozen_as_computed
    from kcv2diffusers.dreambooth.model import DreamBooth
    from kcv2diffusers.dreambooth.optimizers import make_optimizer
    from kcv2diffusers.models.layers import dtype_policy, zeros

    sizes: dict[str, Any] = (
        {"widths": (32, 64), "heads": (2, 2), "context_width": 48, "blocks": 1} if arguments.small else {}
    )
    config = models.UNetConfig(**sizes, gelu="exact")
    with dtype_policy("mixed_bfloat16"), zeros():
        unet = models.build_unet(config)
        rng = np.random.default_rng(0)
        block = rng.random(1_000_003, dtype="float32") * 0.04 - 0.02
        for variable in unet.variables:  # random: a GPU computes faster with zeros
            variable.assign(np.resize(block, variable.shape))
        if row.lora:
            add_lora(unet, row.lora, row.lora)
            store_frozen_as_computed(unet)
        model = DreamBooth(unet)
    optimizer = make_optimizer(Config(learning_rate=1e-6), ())
    model.compile(optimizer, jit_compile=row.backend == "jax")
    optimizer.build(model.trainable_variables)
    side, n = arguments.pixels // 8, row.batch
    batch = {
        "latents": rng.standard_normal((n, side, side, 4), dtype="float32"),
        "noise": rng.standard_normal((n, side, side, 4), dtype="float32"),
        "timesteps": rng.integers(0, 1000, n).astype("int32"),
        "condition": rng.standard_normal((n, 77, config.context_width), dtype="float32"),
        "prior": np.zeros(n, "float32"),
    }
    if row.backend == "jax":
        return jax_step(model, batch)
    import torch

    from kcv2diffusers.dreambooth.torch_step import TorchStep

    model.record_steps = "recorded" in row.mode
    model.train()
    training = TorchStep(model)
    return partial(training, batch), (lambda: None) if arguments.cpu else torch.cuda.synchronize


def jax_step(model: Any, batch: dict[str, Any]) -> tuple[Step, Step]:
    """Keras' own compiled step, called as `fit` does."""
    import jax

    model._symbolic_build(data_batch=(batch,))
    model.make_train_function()
    names = ("trainable", "non_trainable", "optimizer", "metrics")
    wanted = {f"{name}_variables": True for name in names}
    state = [model._get_jax_state(**wanted, purge_model_variables=True)]

    def step() -> None:
        _, state[0] = model.train_function(state[0], iter([(batch,)]))

    return step, lambda: jax.block_until_ready(state[0])


def diffusers(row: Row, arguments: argparse.Namespace) -> tuple[Step, Step]:
    import dreambooth
    import torch

    options = argparse.Namespace(
        precision="mixed_bfloat16",
        small=arguments.small,
        lora=row.lora,
        batch=row.batch,
        pixels=arguments.pixels,
    )
    device = "cpu" if arguments.cpu else "cuda"
    with torch.device(device):  # random weights take 15 s on a CPU
        step = dreambooth.diffusers(options, device, compiled=row.mode == "compiled", reads_loss=False)
    return step, (lambda: None) if arguments.cpu else torch.cuda.synchronize


def profile(step: Step, wait: Step, cpu: bool) -> dict[str, Any]:
    """The kernels of a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, *([] if cpu else [ProfilerActivity.CUDA])]) as seen:
        for _ in range(3):
            step()
        wait()
    key = "self_cpu_time_total" if cpu else "self_device_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, key))
    calls = {
        event.key: event.count / 3
        for event in events
        if event.key.startswith(
            (
                "cudaLaunch",
                "cuLaunch",
                "cudaMemcpy",
                "cudaStreamSync",
                "cudaDeviceSync",
                "cudaGraphLaunch",
                "cudaMemset",
            )
        )
    }
    kernels = [e for e in events if getattr(e, key) > 0]
    return {
        "calls a step": calls,
        "device ms": round(
            sum(getattr(e, key) for e in kernels if str(e.device_type).endswith("CUDA")) / 3e3, 2
        ),
        "kernels": [
            [e.key[:90], str(e.device_type)[-4:], e.count / 3, round(getattr(e, key) / 3e3, 3)]
            for e in kernels[:60]
        ],
    }


def micro() -> dict[str, Any]:
    """What the card can do: products, copies, attention at SD1's head widths, convolutions, norms."""
    import torch
    from torch.nn import functional as f
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "cudnn": torch.backends.cudnn.version(),
    }

    def ms(work: Callable[[], object], n: int = 8) -> float:
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        at = time.perf_counter()
        for _ in range(n):
            work()
        torch.cuda.synchronize()
        return round((time.perf_counter() - at) / n * 1e3, 3)

    def random(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x = random(8192, 8192)
    found["bf16 TFLOP/s"] = round(2 * 8192**3 / ms(lambda: x @ x) / 1e9)
    y = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    z = torch.empty_like(y)
    found["copy GB/s"] = round(2 * (1 << 30) / ms(lambda: z.copy_(y)) / 1e6)
    for width, length in ((40, 4096), (80, 1024), (160, 256)):
        for other in (length, 77):
            q = random(4, length, 8, width).transpose(1, 2).requires_grad_()
            k = random(4, other, 8, width).transpose(1, 2).requires_grad_()
            for backend in (
                None,
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
            ):

                def both(q: Any = q, k: Any = k) -> None:
                    out = f.scaled_dot_product_attention(q, k, k)
                    out.backward(out)

                try:
                    with sdpa_kernel([backend]) if backend else _nothing():
                        value: Any = ms(both)
                except RuntimeError as error:
                    value = type(error).__name__
                found[f"attention {width} {length}x{other} {backend.name if backend else 'default'}"] = value
    last = torch.channels_last
    for width, side in ((320, 64), (640, 32), (1280, 16)):
        kernel, image = random(width, width, 3, 3), random(4, width, side, side)
        kernel_last, image_last = kernel.to(memory_format=last), image.to(memory_format=last)
        found[f"conv {width} {side}, NCHW and NHWC"] = [
            ms(lambda a=image, b=kernel: f.conv2d(a, b, padding=1)),
            ms(lambda a=image_last, b=kernel_last: f.conv2d(a, b, padding=1)),
        ]
        found[f"group norm {width} {side}, NCHW and NHWC"] = [
            ms(lambda a=image: f.group_norm(a, 32)),
            ms(lambda a=image_last: f.group_norm(a, 32)),
        ]
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def tiny(arguments: argparse.Namespace) -> dict[str, Any]:
    """DreamBooth on the tiny base in bfloat16: straight, and stopped and resumed; exported and verified."""
    folder = arguments.out.absolute().parent / "gpu-tiny"
    shutil.rmtree(folder, ignore_errors=True)
    photos = ROOT / "kcv2diffusers" / "tiny" / "subject"
    count = 20 if arguments.small else 250
    common = [
        sys.executable,
        "-m",
        "kcv2diffusers",
        "dreambooth",
        "--base",
        "tiny",
        "--instance-images",
        str(photos),
        "--instance-prompt",
        "a photo of sks panda",
        "--steps",
        str(count),
        "--precision",
        "float32" if arguments.cpu else "mixed_bfloat16",
        "--learning-rate",
        "1e-4",
        "--checkpoint-every",
        str(count // 2),
        "--sample-steps",
        "10",
    ]
    found: dict[str, Any] = {}

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*common, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(name: str, child: subprocess.Popen[str], at: float) -> None:
        words = child.communicate()[0]
        found[f"{name} s"], found[f"{name} rc"] = round(time.monotonic() - at, 1), child.returncode
        if child.returncode not in (0, 130):
            found[f"{name} said"] = words[-900:]

    at = time.monotonic()
    straight = start("--out", str(folder / "a"), "--export", str(folder / "pipeline"))
    stopped = start("--out", str(folder / "b"))
    while stopped.poll() is None and not (folder / "b" / "checkpoints" / f"step-{count // 2:06}").exists():
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    end("stopped", stopped, at)
    at = time.monotonic()
    end("resumed", start("--out", str(folder / "b"), "--resume"), at)
    end("straight", straight, at)
    print("RESULT", json.dumps(found), flush=True)
    losses = [
        [float(line.split(",")[1]) for line in (folder / run / "log.csv").read_text().splitlines()[1:]]
        for run in "ab"
    ]
    found["loss, first and last 25"] = [
        [round(statistics.mean(part), 4) for part in (one[:25], one[-25:])] for one in losses
    ]
    found["largest difference of losses"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    import h5py
    import numpy as np

    def values(run: str) -> Any:
        with h5py.File(folder / run / "resume" / f"step-{count:06}.h5") as file:
            group = file["trainable"]
            return np.concatenate([np.asarray(group[str(i)]).ravel() for i in range(len(group))])

    a, b = values("a"), values("b")
    found["largest difference of weights"] = float(np.abs(a - b).max())
    found["sum of weights"] = [float(a.sum(dtype="float64")), float(b.sum(dtype="float64"))]
    print("RESULT", json.dumps(found), flush=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kcv2diffusers",
            "verify",
            str(folder / "pipeline"),
            str(folder / "a" / "checkpoints" / f"step-{count:06}"),
            "--base",
            "tiny",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    found["verify rc"], found["verify"] = done.returncode, (done.stdout + done.stderr)[-1500:]
    return found


def table(file: Path) -> str:
    """The timed rows of a run in Markdown; what failed says so. The share of peak arithmetic is of the UNet's
    forward and backward pass, and of what the card reached in a large product.
    """
    found = [json.loads(line) for line in file.read_text().splitlines()]
    card = next(each["found"] for each in found if each["row"]["kind"] == "micro")
    lines = [
        f"{card['gpu']}, PyTorch {card['torch']}; SD1, 512 px, bfloat16, AdamW; medians of four steps",
        "",
        "| | weights | batch | steps/s | of peak | first step | peak memory |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row, figures in ((each["row"], each["found"]) for each in found if not each["warm"]):
        if row["kind"] not in ("ours", "diffusers"):
            continue
        what = f"LoRA of rank {row['lora']}" if row["lora"] else "all"
        line = f"| {row['name']} | {what} | {row['batch']} "
        if "steps/s" not in figures:
            lines.append(f"{line}| not measured | | | |")
            continue
        share = unet_flops(row["batch"]) * figures["steps/s"] / card["bf16 TFLOP/s"] / 1e12
        line += f"| {figures['steps/s']:.2f} | {'' if row['lora'] else f'{share:.0%}'} "
        lines.append(f"{line}| {figures['first']:.0f} s | {figures['GB peak']:.1f} GB |")
    return "\n".join(lines)


def unet_flops(batch: int, pixels: int = 512) -> float:
    """Floating-point operations of a forward and a backward pass of SD1's UNet, the backward pass counted as
    two forward passes.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet = UNet2DConditionModel(attention_head_dim=8, cross_attention_dim=768)
        given = torch.empty(batch, 4, pixels // 8, pixels // 8), torch.zeros(batch)
        with FlopCounterMode(display=False) as counter:
            unet(*given, torch.empty(batch, 77, 768))
    return 3.0 * counter.get_total_flops()


def wheels(folder: Path) -> None:
    """Fetch what a bare machine lacks, in the versions of constraints/dev.txt."""
    lines = (ROOT / "constraints" / "dev.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower().replace("-", "_"): line for line in lines}
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    for name in WHEELS:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--python-version",
                "3.12",
                "--implementation",
                "cp",
                *platforms,
                "-d",
                str(folder),
                pins[name.replace("-", "_")],
            ],
            check=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--warm-seconds", type=float, default=240, help="of these, for compiling")
    parser.add_argument("--together", type=int, default=0, help="compilations at a time (default: what fits)")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--list", action="store_true", help="name the rows, the most valuable first")
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--cpu", action="store_true", help="to try the script")
    parser.add_argument("--small", action="store_true", help="small widths, to try the script")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.wheels:
        return wheels(arguments.wheels)
    if arguments.list:
        return print("\n".join(f"{row.name} {row.lora} {row.batch}" for row in rows()))
    if arguments.table:
        kept = ROOT / ".cache" / "gpu.md"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(table(arguments.table) + "\n")
        return print(kept.read_text())
    if arguments.worker:
        return print("RESULT", json.dumps(work(arguments)), flush=True)
    Run(arguments).all()


if __name__ == "__main__":
    main()
