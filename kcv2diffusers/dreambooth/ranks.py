"""The processes of a run on several GPUs or machines. Each trains on its share of every batch.

A launcher starts them and sets environment variables: torchrun its own for PyTorch; for JAX those that
`keras.distribution.initialize` reads. A process has a rank; the one of rank 0 saves, draws, logs and prints.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.errors import Error

Item = TypeVar("Item")

# For each backend, the variables with the rank, the number of processes, and the address of the first one.
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
_KERAS = (
    "KERAS_DISTRIBUTION_PROCESS_ID",
    "KERAS_DISTRIBUTION_NUM_PROCESSES",
    "KERAS_DISTRIBUTION_JOB_ADDRESSES",
)
_LONGEST = timedelta(hours=1)  # for PyTorch: the others wait while rank 0 draws or saves
# What the libraries say when another process has gone.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Gloo",
    "gloo",
    "NCCL",
    "coordination service",
    "Socket closed",
)


@dataclass
class Group:
    """The processes of a run, as one of them sees it; this class is a run of one process.

    `rank` is the number of this process, of `count`. All processes must call a method in the same order.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process saves, draws, logs and prints."""
        return self.rank == 0

    def part(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The share of this process of the images of a step."""
        rows = {len(values) // self.count for values in batch.values()}.pop()
        return {name: values[self.rank * rows :][:rows] for name, values in batch.items()}

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that this process works on; the others have the rest."""
        return items[self.rank :: self.count]

    def sum(self, values: Array) -> Array:
        """The sum of an array over all processes. Waits for all of them."""
        return values

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes gave; of their previous calls if there are several.

        So no process waits for the step that the others have just begun.
        """
        return number

    def leave(self) -> None:
        """End the group, once all processes call this. Each goes on alone."""

    def wait(self) -> None:
        """Wait for all processes to call this."""
        self.sum(np.zeros(1, "int32"))

    def from_first(self, number: int) -> int:
        """The number that rank 0 gives."""
        return int(self.sum(np.array([number if self.first else 0], "int32"))[0])

    def check_same(self, *what: str) -> None:
        """Raise Error if the other processes do not give the same texts."""
        digest = hashlib.sha256("\0".join(what).encode()).digest()
        found = np.zeros((self.count, 4), "int32")
        found[self.rank] = np.frombuffer(digest[:16], "int32")
        found = self.sum(found)
        if other := [rank for rank in range(self.count) if (found[rank] != found[0]).any()]:
            raise Error(
                f"The processes of ranks 0 and {other[0]} have other options, photos or versions.\n"
                "Start all with the same command; let all machines see the same folders."
            )

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A block that rank 0 runs before the others, for files that it makes and the others then find."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


ALONE = Group()


class _TorchGroup(Group):
    """Processes that torchrun has started. Arrays go by gloo, gradients of a GPU by NCCL."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            place = int(os.environ.get("LOCAL_RANK", "0"))
            if place >= torch.cuda.device_count():
                raise Error(
                    f"Process {place} of this machine has no GPU; there are {torch.cuda.device_count()}.\n"
                    "Start as many processes a machine as it has GPUs (torchrun --nproc-per-node)."
                )
            torch.cuda.set_device(place)  # Keras computes on the current device
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_LONGEST)
        else:
            dist.init_process_group("gloo", timeout=_LONGEST)
        super().__init__(dist.get_rank(), dist.get_world_size())
        self._posted: Any = None

    def sum(self, values: Array) -> Array:
        import torch
        import torch.distributed as dist

        tensor = torch.from_numpy(np.array(values))
        dist.all_reduce(tensor)
        return np.asarray(tensor.numpy())

    def largest(self, number: int) -> int:
        import torch
        import torch.distributed as dist

        before, value = self._posted, torch.tensor([number])
        self._posted = value, dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def leave(self) -> None:
        import torch.distributed as dist

        self.wait()
        dist.destroy_process_group()


class _JaxGroup(Group):
    """Processes of `jax.distributed`, each with all devices that it sees."""

    def __init__(self) -> None:
        import jax

        rank, count, addresses = (os.environ[name] for name in _KERAS)
        # Otherwise JAX handles SIGTERM.
        jax.config.update("jax_enable_preemption_service", False)  # type: ignore[no-untyped-call]
        jax.distributed.initialize(addresses.split(",")[0], int(count), int(rank))
        super().__init__(jax.process_index(), jax.process_count())
        self._posted: Any = None
        sharding: Any = jax.sharding
        mesh = sharding.Mesh(np.array(jax.devices()), ("all",))
        self._rows = sharding.NamedSharding(mesh, sharding.PartitionSpec("all"))
        whole = sharding.NamedSharding(mesh, sharding.PartitionSpec())
        self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=whole)

    def sum(self, values: Array) -> Array:
        from jax.experimental import multihost_utils

        gathered = np.asarray(multihost_utils.process_allgather(np.asarray(values)))
        return np.asarray(gathered.sum(0, dtype=values.dtype))

    def largest(self, number: int) -> int:
        import jax

        make: Any = jax.make_array_from_process_local_data
        before, given = self._posted, np.full(jax.local_device_count(), number, "int32")
        self._posted = self._largest(make(self._rows, given))
        return 0 if before is None else int(before)

    def leave(self) -> None:
        import jax

        self.wait()
        jax.distributed.shutdown()  # type: ignore[no-untyped-call]


def rank() -> int:
    """The rank of this process according to its launcher; 0 if there is none."""
    return next((int(os.environ[names[0]]) for names in (_TORCHRUN, _KERAS) if _launched(names)), 0)


def _launched(names: tuple[str, ...]) -> bool:
    """Whether a launcher has set these variables, for more than one process."""
    return all(name in os.environ for name in names) and int(os.environ[names[1]]) > 1


@contextmanager
def joined(backend: str) -> Iterator[Group]:
    """The group of this process, for one run on a Keras `backend`.

    Raises Error if the launcher is one for another backend, and in this block if another process has ended.
    """
    launchers = {"torch": _TORCHRUN, "jax": _KERAS}
    ours = launchers.pop(backend, ())
    if not (ours and _launched(ours)):
        if any(map(_launched, launchers.values())):
            raise Error(
                f"Several processes were started for another backend than {backend}.\n"
                "Use torchrun for PyTorch, and for JAX the variables KERAS_DISTRIBUTION_*."
            )
        yield ALONE
        return
    named = f"rank {rank()}: " if rank() else ""
    try:
        yield _TorchGroup() if backend == "torch" else _JaxGroup()
    except BaseException as error:
        # The libraries would wait at the end of this process for the others.
        atexit.register(_end_at_once, error.code if isinstance(error, SystemExit) else 1)
        if isinstance(error, Error):
            raise Error(f"{named}{error}") from error
        if not isinstance(error, Exception) or not any(words in str(error) for words in _LOST):
            raise
        raise Error(
            f"{named}Another process of this run has ended, and so does this one; what was saved is kept.\n"
            "The message of the other says why. --resume goes on."
        ) from error


def _end_at_once(code: object) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
