"""The processes of one training, as torchrun starts them, and what they tell each other; mostly there is only one.

    torchrun --nproc_per_node=2 train_cnn.py

Each works out a part of every batch. All hold the same weights and take the same steps, so process 0 can do alone what
is done once: reading and writing the run's folder, validation, words to the user.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process and the others; `rank` counts from 0 to `count` - 1. Alone, it does nothing at no cost."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch, which differ in number by at most one from another's."""
        return batch.tensor_split(self.count)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, *numbers: int) -> list[int]:
        """The largest that any process passes, number by number."""
        if self.count == 1:
            return list(numbers)
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_first(self, value: Value) -> Value:
        """What process 0 passes: tensors, numbers, text, and nests of them."""
        if self.count == 1:
            return value
        content = io.BytesIO()
        if self.is_first:
            torch.save(value, content)
        (size,) = self.largest(len(content.getbuffer()))
        sent = torch.frombuffer(bytearray(content.getvalue().ljust(size)), dtype=torch.uint8)
        dist.broadcast(sent, src=0)
        return torch.load(io.BytesIO(sent.numpy().tobytes()), map_location="cpu", weights_only=True)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The others enter the block when process 0 has left it."""
        if not self.is_first:
            self.largest(0)
        yield
        if self.is_first:
            self.largest(0)

    def connect(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes, and on GPUs batch norm over the whole batch.

        On CPUs, for which PyTorch has no such batch norm, each process normalises its own part, and process 0's running
        statistics count.
        """
        if self.count == 1:
            return model
        if next(model.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        connected = DistributedDataParallel(model)
        if self.count > 2 and not next(model.parameters()).is_cuda:
            connected.register_comm_hook(self, _average_one_by_one)
        return connected


def _average_one_by_one(processes: Processes, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average the gradients of a bucket parameter by parameter.

    PyTorch would add up a bucket as a whole. After its first step it packs the buckets anew, and with three processes
    or more the place in a bucket decides in which order is added: a training that was resumed would differ in the last
    bit from one that was not. On GPUs bits are not promised, and starting many small exchanges would cost more.
    """
    for gradient in bucket.gradients():
        processes.total(gradient.div_(processes.count))
    averaged: torch.futures.Future[Tensor] = torch.futures.Future()
    averaged.set_result(bucket.buffer())
    return averaged


ALONE = Processes()


def launched() -> Processes:
    """The processes that torchrun started, this one among them, not yet joined."""
    if not dist.is_torchelastic_launched():
        return ALONE
    return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, joined until they `leave`: by gloo, and by nccl for GPUs.

    device: where all of them train, as `--device` says it. Raises UserError if they cannot train there, or if one of
    the others ends within the block.
    """
    processes = launched()
    if processes.count == 1:
        yield processes
        return
    backend = "gloo"
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise UserError("several processes cannot share this GPU: use --device cpu, or a single process")
    if device != "cpu" and torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"there is no GPU for process {local} on this machine, which has {gpus}: "
                            f"start torchrun with --nproc_per_node={gpus}, or use --device cpu")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    with explained("start all of them again"):
        dist.init_process_group(backend)
        yield processes


def leave(status: int) -> int:
    """`status`; but a process that has joined others ends here, with it as its exit status.

    Python's usual end is at times an abort if threads of gloo still hold tensors (PyTorch's pull request 179291).
    """
    if dist.is_initialized():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    return status


@contextmanager
def explained(advice: str) -> Iterator[None]:
    """Turn what is raised when another process is gone into a UserError that says so."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(f"another process of this training has ended, so this one ends too; {advice}") from error
