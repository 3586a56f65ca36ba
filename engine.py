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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hardware import autocast, choose_precision, machine_facts, peak_memory, prepare_device, wait_for
from models.layers import set_side
from optimizers import make_optimizers, set_rates
from runs import Run
from settings import Command, Settings
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
    """How far a training has come. `loss` and `correct` are sums over the pictures of the epoch under way."""

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
    model: nn.Module
    forward: nn.Module  # the model, or the same compiled
    optimizers: list[torch.optim.Optimizer]
    flops: list[int]  # of each epoch
    state: _State
    saved_at: float  # time.monotonic() of the last checkpoint

    def save(self) -> None:
        """Write a checkpoint, unless what it would hold is no longer finite."""
        self.require_finite(self.model.parameters(), "weights")
        progress = {name: getattr(self.state, name) for name in self.state.__dataclass_fields__}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        self.run.save_checkpoint({"model": self.model.state_dict(), "optimizers": optimizers, "progress": progress})
        self.saved_at = time.monotonic()

    def restore(self) -> bool:
        """Go back to the run's checkpoint, if it has one; returns whether it has.

        Raises UserError if the checkpoint is damaged or belongs to other settings.
        """
        saved = self.run.load_checkpoint()
        if saved is None:
            return False
        try:
            self.model.load_state_dict(saved["model"])
            for optimizer, state_dict in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state_dict)
            device = self.state.loss.device
            self.state = _State(**saved["progress"])
            self.state.loss, self.state.correct = self.state.loss.to(device), self.state.correct.to(device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            path = self.run.checkpoint_path
            raise UserError(f"{path} does not fit the network that its config.json describes ({error})") from error
        return True

    def require_finite(self, tensors: Iterable[Tensor], what: str) -> None:
        if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return
        epoch = min(self.state.epoch + 1, self.run.settings.epochs)
        has_one = self.run.checkpoint_path.exists()
        kept = "the checkpoint before that is kept" if has_one else "there was no checkpoint yet"
        raise UserError(f"the {what} of {self.run.name} stopped being finite by epoch {epoch}, step {self.state.step}; "
                        f"{kept}; try a smaller --lr or --precision float32")


def fit_and_place(model: nn.Module, split: Split, settings: Settings) -> nn.Module:
    """The model on its device, in channels_last order, with its normalisation fitted to the first training pictures."""
    model.fit_inputs(to_float(split.images[:INPUT_SAMPLE]))
    return model.to(settings.device, memory_format=torch.channels_last)


def train_runs(command: Command) -> int:
    """What a training script does but for the overfit check: one run a seed, or the one to resume.

    Returns the exit status; raises UserError for what the user can put right.
    """
    resumed = None if command.resume is None else Run.resume(
        command.results_dir, command.resume, command.script.settings_class, command.given)
    told = command.settings if resumed is None else resumed.settings
    train_split, val_split = load_cifar100(
        told.data_folder, train_on_all=told.train_on_all, use_synthetic=told.synthetic)
    for seed in command.seeds if resumed is None else (told.seed,):
        settings = prepare_device(replace(told, seed=seed))
        torch.manual_seed(derived_seed("init", seed))
        model = fit_and_place(command.script.build_model(settings, len(train_split.fine_names)), train_split, settings)
        if resumed is None:
            settings = choose_precision(model, train_split, settings)
            told = replace(told, precision=settings.precision)  # the same for every seed
        with resumed or Run.create(
            command.results_dir, settings, command.name, command.script.command_for(settings)
        ) as run:
            status = _train_and_tell(model, train_split, val_split, run, command)
        if status:
            return status
    return 0


def _train_and_tell(model: nn.Module, train_split: Split, val_split: Split | None, run: Run, command: Command) -> int:
    """One run, with the words a user reads around it; returns the exit status."""
    settings = run.settings
    measure = f"measure it on the test set: {command.next_command(f'python evaluate.py {run.name}')}"
    if run.finished:
        print(f"{run.name} is finished already; {measure}")
        return 0
    print(f"{run.name}: {settings.epochs} epochs on {len(train_split):,} {settings.pictures}, {settings.precision} on "
          f"{settings.device} with {settings.threads} threads, in {run.folder}", flush=True)
    try:
        result = train(model, train_split, val_split, run, quiet=command.quiet)
    except Interrupted as stop:
        if run.finished:
            print(f"\n{stop}: {run.name} is finished, and nothing after it was started; {measure}", flush=True)
            return stop.status
        again = command.next_command(f"python {command.script.file} --resume {run.name}")
        print(f"\n{stop}: the state is saved; go on with: {again}", flush=True)
        return stop.status
    accuracy = "trained on all pictures, so there is no validation accuracy" if result["val_acc"] is None \
        else f"validation accuracy {result['val_acc']:.2f}%"
    print(f"{run.name}: {accuracy}; {result['train_seconds']:.0f} s of training, {result['train_flops']:.1e} FLOPs, "
          f"{result['images_per_second']:,.0f} images/s\n{measure}", flush=True)
    return 0


def print_epoch(row: dict[str, Any], settings: Settings) -> None:
    val = "" if row["val_acc"] is None else f", val loss {row['val_loss']:.3f}, val acc {row['val_acc']:.2f}%"
    tqdm.write(f"epoch {row['epoch']:>3}/{settings.epochs}: train loss {row['train_loss']:.3f}, "
               f"train acc {row['train_acc']:.2f}%{val}, {row['seconds']:.1f} s", file=sys.stdout)
    sys.stdout.flush()


def train(
    model: nn.Module, train_split: Split, val_split: Split | None, run: Run, *, quiet: bool = False,
    after_epoch: Callable[[dict[str, Any], Settings], None] = print_epoch,
) -> dict[str, Any]:
    """Train `model`, placed by `fit_and_place`, as `run.settings` say, from the run's checkpoint if it has one.

    Writes the run's files and returns what `result.json` holds. Raises Interrupted after a signal, with the state
    saved, and UserError if the loss is no longer finite, with the last good checkpoint in place. `after_epoch` gets
    each epoch's row of `metrics.csv`, and may raise to end the training there.
    """
    settings, device = run.settings, torch.device(run.settings.device)
    data = train_split.to(device)
    steps = steps_per_epoch(len(data), settings.batch_size)
    state = _State(loss=torch.zeros((), device=device), correct=torch.zeros((), device=device, dtype=torch.int64))
    flops = epoch_flops(model, len(data), settings)
    forward = torch.compile(model) if settings.compile else model
    training = _Training(run, model, forward, make_optimizers(model, settings), flops, state,
                         saved_at=time.monotonic())
    with StopRequest() as stop:
        machine = machine_facts(device.type)
        was_resumed = training.restore()
        state = training.state
        done = sum(flops[:state.epoch]) + (flops[state.epoch] * state.step / steps if state.step else 0)
        with tqdm(total=sum(flops), initial=done, unit="FLOP", unit_scale=True,  # steps differ in length, FLOPs do not
                  disable=True if quiet else None, mininterval=REFRESH_SECONDS, dynamic_ncols=True) as bar:
            while state.epoch < settings.epochs:
                _train_epoch(training, data, stop, bar)
                _end_epoch(state, model, val_split, training.optimizers[0].param_groups[0]["lr"])
                run.log(state.rows)
                after_epoch(state.rows[-1], settings)
        training.save()
        result = _result(training, len(data), machine, was_resumed=was_resumed)
        run.finish(model, state.rows, result)
    if stop.signal:  # it came after the last step: this run is whole, but nothing else is to follow
        raise Interrupted(stop.signal)
    return result


def _train_epoch(training: _Training, data: Split, stop: "StopRequest", bar: tqdm) -> None:
    """The rest of the epoch that `training.state` is in. Raises Interrupted, with the state saved, after a signal."""
    settings, state = training.run.settings, training.state
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
        images, targets = mix(images, labels)
        logits, loss = training_step(training.forward, training.optimizers, images, targets, settings)
        state.loss += loss * len(labels)
        state.correct += (logits.argmax(1) == (targets if targets.ndim == 1 else targets.argmax(1))).sum()
        state.pictures += len(labels)
        state.step += 1
        state.epoch_seconds = time.perf_counter() - start
        bar.update(training.flops[state.epoch] / steps)
        if time.monotonic() - looked > REFRESH_SECONDS:
            looked = time.monotonic()
            _describe(bar, state, settings)
            training.require_finite([state.loss], "loss")
        if stop.signal or time.monotonic() - training.saved_at > 60 * settings.checkpoint_every:
            training.require_finite([state.loss], "loss")
            training.save()
        if stop.signal:
            raise Interrupted(stop.signal)
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
        "resumed": was_resumed,
        "machine": machine,
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
    model: nn.Module, optimizers: list[torch.optim.Optimizer], images: Tensor, targets: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """One step on a batch; returns the logits, [B, 100], and the mean loss, a scalar, both detached.

    targets: class indices, int64 [B], or shares of each class, float32 [B, 100].
    """
    with autocast(images.device, settings.precision):
        logits = model(images.contiguous(memory_format=torch.channels_last))
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=settings.label_smoothing)
    descend(loss, optimizers)
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
