"""The training loop that both scripts share, and what it is made of: optimizer, schedule, precision, cost.

It sees training and validation pictures only. Everything random is derived from (seed, epoch, step), so a checkpoint
is the weights, the optimizers and how far the run has come: there is no generator to save.
"""

import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hardware import (
    autocast,
    choose_precision,
    machine_facts,
    peak_memory,
    prepare_device,
    require_memory,
    wait_for,
)
from models.layers import set_side
from optimizers import make_optimizers, set_rates
from parallel import ALONE, Processes, explained, join
from runs import METRICS, Run, Unwritten
from settings import Command, Script, Settings
from utils import (
    Augmentation,
    Split,
    UserError,
    batches,
    compute_logits,
    derived_seed,
    load_cifar100,
    steps_per_epoch,
    to_float,
)

REFRESH_SECONDS = 0.5  # between looks at the running loss, each of which waits for the device
REFRESH_BATCH = 500  # pictures at once for new batch-norm statistics
INPUT_SAMPLE = 10_000  # training pictures from which a model fits its normalisation


class Interrupted(Exception):
    """SIGINT or SIGTERM came and the state is saved; `status` is the exit status that says so."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.status = 128 + signal_number


def forward_flops(model: nn.Module) -> int:
    """FLOPs of one 32x32 picture's forward pass, a multiply-add counted as two, as PyTorch's own counter has them."""
    was_training = model.training
    picture = torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(picture)
    model.train(was_training)
    return counter.get_total_flops()


def epoch_flops(model: nn.Module, pictures: int, settings: Settings) -> list[int]:
    """Training FLOPs, 3 x forward, of each epoch on `pictures` pictures. The model is left at the last epoch's side."""
    sides = [settings.side_in(epoch) for epoch in range(settings.epochs)]
    forward = {}
    for side in dict.fromkeys(reversed(sides)):
        set_side(model, side)
        forward[side] = forward_flops(model)
    set_side(model, sides[-1])
    return [3 * forward[side] * pictures for side in sides]


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """How far a training has come. `loss` and `correct` are sums over the pictures of the epoch under way, of all
    processes.
    """

    loss: Tensor
    correct: Tensor
    epoch: int = 0
    step: int = 0
    pictures: int = 0
    epoch_seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Training:
    """All that changes while training, and the run that it is saved in."""

    run: Run
    processes: Processes
    model: nn.Module
    forward: nn.Module  # the model, or the same connected to other processes' or compiled
    optimizers: list[torch.optim.Optimizer]
    flops: list[int]  # of each epoch
    state: _State
    saved_at: float  # time.monotonic() of the last checkpoint

    def save(self) -> None:
        """Write a checkpoint, unless what it would hold is no longer finite."""
        self.require_finite(self.model.state_dict().values(), "weights")
        progress = {name: getattr(self.state, name) for name in self.state.__dataclass_fields__}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        self.run.save_checkpoint({"model": self.model.state_dict(), "optimizers": optimizers, "progress": progress})
        self.saved_at = time.monotonic()

    def restore(self) -> bool:
        """Go back to the run's checkpoint, if it has one; returns whether it has.

        Raises UserError if the checkpoint is damaged or belongs to other settings.
        """
        saved = self.processes.from_first(self.run.load_checkpoint())
        if saved is None:
            return False
        try:
            self.model.load_state_dict(saved["model"])
            for optimizer, state_dict in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state_dict)
            _require_shapes(self.optimizers)
            device = self.state.loss.device
            self.state = _State(**saved["progress"])
            _require_possible(self.state, self.run.settings.epochs)
            self.state.loss, self.state.correct = self.state.loss.to(device), self.state.correct.to(device)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            path = self.run.checkpoint_path
            raise UserError(f"{path} does not fit the network that its config.json describes ({error})") from error
        return True

    def require_finite(self, tensors: Iterable[Tensor], what: str) -> None:
        if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return
        epoch = min(self.state.epoch + 1, self.run.settings.epochs)
        raise UserError(f"the {what} of {self.run.name} stopped being finite by epoch {epoch}, step {self.state.step}; "
                        "the last checkpoint, if there is one, is kept; try a smaller --lr or --precision float32")


def _require_possible(state: _State, epochs: int) -> None:
    """Raises ValueError unless a training of so many epochs can have come as far."""
    counts = [state.epoch, state.step, state.pictures]
    values = [value for row in state.rows for value in row.values() if value is not None]
    if any(type(count) is not int or count < 0 for count in counts) \
            or any(type(value) not in (int, float) for value in [state.epoch_seconds, *values]) \
            or state.epoch > epochs or [row["epoch"] for row in state.rows] != [*range(1, state.epoch + 1)] \
            or any(row.keys() != set(METRICS) for row in state.rows) or state.loss.ndim or state.correct.ndim \
            or state.step > state.pictures:
        raise ValueError("its progress is impossible")


def _require_shapes(optimizers: list[torch.optim.Optimizer]) -> None:
    """Raises ValueError unless what the optimizers keep of a parameter has its shape, which PyTorch takes on trust."""
    for optimizer in optimizers:
        for parameter, kept in optimizer.state.items():
            if any(tensor.ndim and tensor.shape != parameter.shape for tensor in kept.values()):
                raise ValueError("an optimizer's state has another shape than its parameter")


def new_model(script: Script, settings: Settings, split: Split, num_outputs: int) -> nn.Module:
    """The network of `settings` with the weights that its seed gives, placed by `fit_and_place`.

    Raises UserError if this machine has not the memory to train it.
    """
    require_memory(lambda: script.build_model(settings, num_outputs), settings.device)
    torch.manual_seed(derived_seed("init", settings.seed))
    return fit_and_place(script.build_model(settings, num_outputs), split, settings)


def fit_and_place(model: nn.Module, split: Split, settings: Settings) -> nn.Module:
    """The model on its device, in channels_last order, with its normalisation fitted to the first training pictures."""
    model.fit_inputs(to_float(split.images[:INPUT_SAMPLE]))
    return model.to(settings.device, memory_format=torch.channels_last)


def train_runs(command: Command) -> int:
    """What a training script does but for the overfit check: one run a seed, or the one to resume.

    Returns the exit status; raises UserError for what the user can put right.
    """
    with join(command.settings.device) as processes:
        return _train_runs(command, processes)


def _train_runs(command: Command, processes: Processes) -> int:
    script = command.script

    def agreed(settings: Settings) -> Settings:
        return script.settings_class(**processes.from_first(asdict(settings)))

    resumed = None
    if command.resume is not None and processes.is_first:
        resumed = Run.resume(command.results_dir, command.resume, script.settings_class, command.given, processes.count)
    told = agreed(command.settings if resumed is None else resumed.settings)
    if processes.count > 1 and told.batch_size <= 2 * processes.count:
        raise UserError(f"--batch-size must be above {2 * processes.count} with {processes.count} processes, "
                        f"not {told.batch_size}")
    with processes.first_goes_ahead():  # where the data set is missing it downloads it
        train_split, val_split = load_cifar100(
            told.data_folder, train_on_all=told.train_on_all, use_synthetic=told.synthetic)
    for seed in command.seeds if command.resume is None else (told.seed,):
        settings = prepare_device(replace(told, seed=seed))
        model = new_model(script, settings, train_split, len(train_split.fine_names))
        if command.resume is None and processes.is_first:
            settings = choose_precision(model, train_split, settings)
        settings = agreed(settings)
        told = replace(told, precision=settings.precision)  # the same for every seed
        run = resumed
        if run is None and processes.is_first:
            run = Run.create(command.results_dir, settings, command.name,
                             script.command_for(settings, processes.count), processes.count)
        name = processes.from_first("" if run is None else run.name)
        with run or nullcontext(Unwritten(name, settings)) as opened:
            status = _train_and_tell(model, train_split, val_split, opened, command, processes)
        if status:
            return status
    return 0


def _train_and_tell(
    model: nn.Module, train_split: Split, val_split: Split | None, run: Run | Unwritten, command: Command,
    processes: Processes,
) -> int:
    """One run, with the words a user reads around it; returns the exit status."""
    settings = run.settings
    tell = print if processes.is_first else lambda *words, **options: None
    again = command.next_command(f"{command.script.started(processes.count)} --resume {run.name}")
    measure = f"measure it on the test set: {command.next_command(f'python evaluate.py {run.name}')}"
    if processes.from_first(run.finished):
        tell(f"{run.name} is finished already; {measure}")
        return 0
    start = f"{processes.count} processes, each " if processes.count > 1 else ""
    tell(f"{run.name}: {settings.epochs} epochs on {len(train_split):,} {settings.pictures}, {settings.precision} on "
         f"{settings.device} with {start}{settings.threads} threads, in {command.results_dir / run.name}", flush=True)
    try:
        with explained(f"go on with: {again}"):
            result = train(model, train_split, val_split, run, quiet=command.quiet, processes=processes)
    except Interrupted as stop:
        if run.finished:
            tell(f"\n{stop}: {run.name} is finished, and nothing after it was started; {measure}", flush=True)
        else:
            tell(f"\n{stop}: the state is saved; go on with: {again}", flush=True)
        return stop.status
    accuracy = "trained on all pictures, so there is no validation accuracy" if result["val_acc"] is None \
        else f"validation accuracy {result['val_acc']:.2f}%"
    tell(f"{run.name}: {accuracy}; {result['train_seconds']:.0f} s of training, {result['train_flops']:.1e} FLOPs, "
         f"{result['images_per_second']:,.0f} images/s\n{measure}", flush=True)
    return 0


def print_epoch(row: dict[str, Any], settings: Settings) -> None:
    val = "" if row["val_acc"] is None else f", val loss {row['val_loss']:.3f}, val acc {row['val_acc']:.2f}%"
    tqdm.write(f"epoch {row['epoch']:>3}/{settings.epochs}: train loss {row['train_loss']:.3f}, "
               f"train acc {row['train_acc']:.2f}%{val}, {row['seconds']:.1f} s", file=sys.stdout)
    sys.stdout.flush()


def train(
    model: nn.Module, train_split: Split, val_split: Split | None, run: Run | Unwritten, *, quiet: bool = False,
    after_epoch: Callable[[dict[str, Any], Settings], None] = print_epoch, processes: Processes = ALONE,
) -> dict[str, Any]:
    """Train `model`, placed by `fit_and_place`, as `run.settings` say, from the run's checkpoint if it has one.

    Writes the run's files and returns what `result.json` holds. Raises Interrupted after a signal, with the state
    saved, and UserError if the loss is no longer finite, with the last good checkpoint in place. `after_epoch` gets
    each epoch's row of `metrics.csv`, and may raise to end the training there. Of several `processes` all call this
    alike; the first one alone has a run that is written, validates and calls `after_epoch`.
    """
    settings, device = run.settings, torch.device(run.settings.device)
    data = train_split.to(device)
    steps = steps_per_epoch(len(data), settings.batch_size)
    state = _State(loss=torch.zeros((), device=device), correct=torch.zeros((), device=device, dtype=torch.int64))
    flops = epoch_flops(model, len(data), settings)
    forward = processes.connect(model)
    if settings.compile:
        forward = torch.compile(forward)
    training = _Training(run, processes, model, forward, make_optimizers(model, settings), flops, state,
                         saved_at=time.monotonic())
    with StopRequest() as stop:
        machine = machine_facts(device.type)
        was_resumed = training.restore()
        state = training.state
        done = sum(flops[:state.epoch]) + (flops[state.epoch] * state.step / steps if state.step else 0)
        with tqdm(total=sum(flops), initial=done, unit="FLOP", unit_scale=True,  # steps differ in length, FLOPs do not
                  disable=True if quiet or not processes.is_first else None, mininterval=REFRESH_SECONDS,
                  dynamic_ncols=True) as bar:
            while state.epoch < settings.epochs:
                _train_epoch(training, data, stop, bar)
                _end_epoch(state, model, val_split if processes.is_first else None,
                           training.optimizers[0].param_groups[0]["lr"])
                run.log(state.rows)
                if processes.is_first:
                    after_epoch(state.rows[-1], settings)
        training.save()
        result = _result(training, len(data), machine, was_resumed=was_resumed)
        run.finish(model, state.rows, result)
    (stopped,) = processes.largest(stop.signal)
    if stopped:  # it came after the last step: this run is whole, but nothing else is to follow
        raise Interrupted(stopped)
    return result


def _train_epoch(training: _Training, data: Split, stop: "StopRequest", bar: tqdm) -> None:
    """The rest of the epoch that `training.state` is in. Raises Interrupted, with the state saved, after a signal.

    Every process makes and mixes the whole of each batch, so that it does not depend on how many they are, and works
    out its own part.
    """
    settings, state, processes = training.run.settings, training.state, training.processes
    steps = steps_per_epoch(len(data), settings.batch_size)
    mix = make_mixup(settings.mixup, num_classes=len(data.fine_names))
    start, looked = time.perf_counter() - state.epoch_seconds, 0.0
    set_side(training.model, settings.side_in(state.epoch))
    training.model.train()
    for images, labels in batches(data, settings.batch_size, settings.augmentation, seed=settings.seed,
                                  epoch=state.epoch, first_step=state.step):
        done = state.epoch * steps + state.step
        set_rates(training.optimizers, settings, done / (steps * settings.epochs))
        torch.manual_seed(derived_seed("model", settings.seed, state.epoch, state.step))  # MixUp, dropout
        images, targets = map(processes.part, mix(images, labels))
        if processes.count > 1:
            torch.manual_seed(derived_seed("model", settings.seed, state.epoch, state.step, processes.rank))
        weight = len(images) * processes.count / len(labels)
        logits, loss = training_step(training.forward, training.optimizers, images, targets, settings, weight)
        correct = (logits.argmax(1) == (targets if targets.ndim == 1 else targets.argmax(1))).sum()
        state.loss += processes.total(loss * len(images))
        state.correct += processes.total(correct)
        state.pictures += len(labels)
        state.step += 1
        state.epoch_seconds = time.perf_counter() - start
        bar.update(training.flops[state.epoch] / steps)
        stopped, look = processes.largest(stop.signal, time.monotonic() - looked > REFRESH_SECONDS)
        if look:
            looked = time.monotonic()
            _describe(bar, state, settings)
            training.require_finite([state.loss], "loss")
        if stopped or time.monotonic() - training.saved_at > 60 * settings.checkpoint_every:
            training.require_finite([state.loss], "loss")
            training.save()
        if stopped:
            raise Interrupted(stopped)
    training.require_finite([state.loss], "loss")
    if state.epoch + 1 == settings.epochs:
        refresh_norms(training.model, data, settings.refresh_norms, seed=settings.seed)
    wait_for(state.loss.device)
    state.epoch_seconds = time.perf_counter() - start


def refresh_norms(model: nn.Module, data: Split, pictures: int, *, seed: int) -> None:
    """Take batch norms' statistics anew from about so many training pictures as they are, with the weights as they are.

    A running mean lags behind weights that still move, and has seen augmented pictures (Wu and Johnson 2021, arXiv
    2105.07576, section 3). With 0 pictures nothing happens.
    """
    if not pictures:
        return
    steps = math.ceil(min(pictures, len(data)) / REFRESH_BATCH)
    update_bn((images for images, _ in itertools.islice(
        batches(data, REFRESH_BATCH, Augmentation(), seed=seed, epoch=-1), steps)), model)


def _end_epoch(state: _State, model: nn.Module, val_split: Split | None, lr: float) -> None:
    """Add the epoch's row (accuracies in percent) and go on to the next epoch."""
    row = {"epoch": state.epoch + 1, "train_loss": float(state.loss) / state.pictures,
           "train_acc": 100 * float(state.correct) / state.pictures, "val_loss": None, "val_acc": None,
           "lr": lr, "seconds": round(state.epoch_seconds, 3)}
    if val_split is not None:
        logits = compute_logits(model, val_split.images)
        row["val_loss"] = float(F.cross_entropy(logits, val_split.fine_labels))
        row["val_acc"] = 100 * float((logits.argmax(1) == val_split.fine_labels).float().mean())
    state.rows.append(row)
    state.epoch, state.step, state.pictures, state.epoch_seconds = state.epoch + 1, 0, 0, 0.0
    state.loss.zero_()
    state.correct.zero_()


def _result(training: _Training, pictures: int, machine: dict[str, Any], *, was_resumed: bool) -> dict[str, Any]:
    """What `result.json` holds of a finished training on `pictures` pictures an epoch."""
    rows, settings = training.state.rows, training.run.settings
    seen, seconds = pictures * settings.epochs, sum(row["seconds"] for row in rows)
    return {
        **{name: rows[-1][name] for name in ("train_loss", "train_acc", "val_loss", "val_acc")},
        "epochs": settings.epochs,
        "train_seconds": round(seconds, 2),
        "images_per_second": round(seen / seconds, 1),
        "train_flops": sum(training.flops),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "peak_memory_bytes": peak_memory(settings.device),
        "processes": training.processes.count,
        "resumed": was_resumed,
        "machine": {**machine, "threads": settings.threads * training.processes.count},
    }


def make_mixup(alpha: float, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """MixUp (Zhang et al. 2017, arXiv 1710.09412) of a batch with itself, the share drawn from PyTorch's generator.

    The function takes images and labels, int64 [B], and returns mixed images and shares, float32 [B, num_classes];
    with an `alpha` of 0 it returns what it is given.
    """
    if not alpha:
        return lambda images, labels: (images, labels)
    from torchvision.transforms.v2 import MixUp  # here, because importing torchvision takes a second

    return MixUp(alpha=alpha, num_classes=num_classes)


def training_step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], images: Tensor, targets: Tensor, settings: Settings,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step on a batch; returns the logits, [B, 100], and the mean loss, a scalar, both detached.

    targets: class indices, int64 [B], or shares of each class, float32 [B, 100]; weight: of this loss in the mean over
    processes, whose parts of a batch may differ by a picture.
    """
    with autocast(images.device, settings.precision):
        logits = model(images.contiguous(memory_format=torch.channels_last))
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=settings.label_smoothing)
    descend(loss * weight, optimizers)
    return logits.detach(), loss.detach()


def descend(loss: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step of every optimizer down the gradient of `loss`."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def _describe(bar: tqdm, state: _State, settings: Settings) -> None:
    rate = state.pictures / max(state.epoch_seconds, 1e-9)
    bar.set_description_str(f"epoch {state.epoch + 1}/{settings.epochs}", refresh=False)
    bar.set_postfix_str(f"loss {float(state.loss) / state.pictures:.3f}, {rate:,.0f} images/s")


class StopRequest:
    """While the block lasts, a first SIGINT or SIGTERM only sets `signal`; a second one acts as it always does."""

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()
