"""The processes of one training: usually one, or several that torchrun has started.

    torchrun --nproc_per_node=2 train_cnn.py

Each process computes a part of every batch; all hold the same weights and take the same steps. Process 0 alone reads
and writes the run's folder, validates, and prints.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.command_line import launched, say
from common.errors import UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`. With a `count` of 1 every method is trivial and free."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def require_batch(self, batch_size: int) -> None:
        """Raise UserError if batches are too small to be divided among the processes."""
        if self.count > 1 and batch_size <= 2 * self.count:
            raise UserError(f"--batch-size must be above {2 * self.count} with {self.count} processes, "
                            f"not {batch_size}")

    def say(self, line: str) -> None:
        """Print a line at once, in process 0 only."""
        if self.is_first:
            say(line)

    def part(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch; the parts differ by at most one row."""
        return batch.tensor_split(self.count)[self.rank]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, *numbers: int) -> list[int]:
        """The maximum over all processes of each number."""
        if self.count == 1:
            return list(numbers)
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_first(self, value: Value) -> Value:
        """The value that process 0 passes, in all processes: tensors, numbers, text, and containers of them."""
        if self.count == 1:
            return value
        content = io.BytesIO()
        if self.is_first:
            torch.save(value, content)
        (size,) = self.max(len(content.getbuffer()))
        sent = torch.frombuffer(bytearray(content.getvalue().ljust(size)), dtype=torch.uint8)
        dist.broadcast(sent, src=0)
        return torch.load(io.BytesIO(sent.numpy().tobytes()), map_location="cpu", weights_only=True)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Let process 0 finish the block before the other processes enter it."""
        if not self.is_first:
            self.max(0)
        yield
        if self.is_first:
            self.max(0)

    def average_gradients(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes and, on GPUs, batch norm over the whole batch.

        PyTorch has no synchronized batch norm for CPUs: there each process normalizes its own part of a batch, and the
        running statistics of process 0 are kept.
        """
        if self.count == 1:
            return model
        if next(model.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        wrapped = DistributedDataParallel(model)
        if self.count > 2 and not next(model.parameters()).is_cuda:
            wrapped.register_comm_hook(self, _average_one_by_one)
        return wrapped


def _average_one_by_one(processes: Processes, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average the gradients of a bucket parameter by parameter.

    PyTorch would sum a bucket as a whole. It repacks the buckets after the first step, and with three or more processes
    a gradient's position in its bucket decides the order of the sum, so a resumed training would differ in the last
    bit. On GPUs no exact bits are promised, and many small exchanges would cost more.
    """
    for gradient in bucket.gradients():
        processes.sum(gradient.div_(processes.count))
    averaged: torch.futures.Future[Tensor] = torch.futures.Future()
    averaged.set_result(bucket.buffer())
    return averaged


ALONE = Processes()


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, until they end (`exit_status`): with gloo, and on GPUs also with nccl.

    device: their `--device`. Raises UserError if they cannot train on it, or if another process ends within the block.
    """
    processes = Processes(*launched())
    if processes.count == 1:
        yield processes
        return
    backend = "gloo"
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise UserError("several processes cannot share this GPU: use --device cpu, or a single process")
    if device != "cpu" and torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"process {local} has no GPU of its own (this machine has {gpus}): start torchrun "
                            f"with --nproc_per_node={gpus}, or use --device cpu")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    with lost_process_explained("start all of them again"):
        dist.init_process_group(backend)
        yield processes


@contextmanager
def lost_process_explained(advice: str) -> Iterator[None]:
    """Turn the error that is raised after another process has ended into a UserError with `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(f"another process of this training has ended, so this one ends too; {advice}") from error
