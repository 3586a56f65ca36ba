"""The training loop. Read `train` from top to bottom; the functions that it calls follow.

It sees training and validation images only. Everything random is derived from (seed, epoch, step), so a checkpoint
consists of the weights, the optimizers and how far the run has come: no generator needs to be saved.
"""

import copy
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common.command_line import say
from common.errors import Interrupted, UserError
from models import load_model
from models.layers import set_side
from training.checkpoint import Optimizers, Progress, restore
from training.distributed import ALONE, Processes, lost_process_explained
from training.hardware import (
    autocast,
    choose_precision,
    choose_threads,
    keep_freed_memory,
    machine_facts,
    peak_memory,
    prepare_device,
    require_compiler,
    require_memory,
    synchronize,
)
from training.optimizers import make_optimizers, replace_by_average, set_rates
from training.run_folder import Run
from training.settings import CUTMIX_SHARE, Script, Settings
from utils import Augmentation, Split, batches, compute_logits, derived_seed, steps_per_epoch, to_float

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Ctrl-C, kill, a lost terminal, a scheduler's warning
LOOK_EVERY = 0.5  # seconds between looks at the running loss, each of which waits for the device
REFRESH_BATCH = 500  # images per batch when batch norm's statistics are recomputed
BAR = "{desc} |{bar}| {percentage:.0f}% of the training{postfix}, ETA {remaining}"  # for tqdm
INPUT_SAMPLE = 10_000  # training images from which a model fits its normalization

LossFunction = Callable[[Tensor, Tensor], Tensor]


def print_epoch(row: dict[str, Any], settings: Settings) -> None:
    """One line per epoch, above the progress bar."""
    val = "" if row["val_acc"] is None else f", val loss {row['val_loss']:.3f}, val acc {row['val_acc']:.2f}%"
    with tqdm.external_write_mode(sys.stdout):
        say(f"epoch {row['epoch']:>3}/{settings.epochs}: train loss {row['train_loss']:.3f}, "
            f"train acc {row['train_acc']:.2f}%{val}, {row['seconds']:.1f} s")


def train(
    model: nn.Module, train_split: Split, val_split: Split | None, run: Run, *, processes: Processes = ALONE,
    quiet: bool = False, after_epoch: Callable[[dict[str, Any], Settings], None] = print_epoch,
) -> dict[str, Any]:
    """Train `model`, a `new_model`, with `run.settings`, from the run's checkpoint if it has one.

    Writes the run's files and returns the content of `result.json`. `after_epoch` gets each epoch's row of
    `metrics.csv`, and may raise to end the training there. All `processes` call this alike; the first one alone
    validates, calls `after_epoch` and has a run with a folder.

    Raises Interrupted after a signal, with a checkpoint saved, and UserError if the loss is no longer finite, with the
    last good checkpoint in place.
    """
    # Prepare. Each process holds the whole training set and takes its part of every batch.
    settings, device = run.settings, torch.device(run.settings.device)
    data = train_split.to(device)
    steps = steps_per_epoch(len(data), settings.batch_size)
    flops = epoch_flops(model, len(data), settings)
    optimizers = make_optimizers(model, settings)
    loss_function = loss_of(settings)
    mix = make_mix(settings, num_classes=len(data.fine_names))
    forward: Any = processes.average_gradients(model)
    if settings.compile:
        forward = torch.compile(forward)

    with (StopRequest() as stop, lost_process_explained(f"resume with: {run.resume_command}"), ExitStack() as stack):
        machine = machine_facts(device.type)

        # Restore. Nothing else needs to be: random numbers and learning rates follow from the step's number.
        saved = processes.from_first(run.load_checkpoint())
        progress = Progress() if saved is None else restore(saved, model, optimizers, run.name, settings.epochs)
        loss_sum = torch.tensor(progress.loss, dtype=torch.float32, device=device)  # reading it waits for the device
        correct_sum = torch.tensor(progress.correct, device=device)
        done = sum(flops[:progress.epoch]) + (flops[progress.epoch] * progress.step / steps if progress.step else 0)
        bar = stack.enter_context(progress_bar(sum(flops), done, disable=quiet or not processes.is_first))
        saved_at = time.monotonic()
        keep_freed_memory(device)  # not before: a damaged checkpoint may take much

        for epoch in range(progress.epoch, settings.epochs):
            set_side(model, settings.side_in(epoch))  # progressive resolution
            model.train()
            started, looked_at = time.perf_counter() - progress.seconds, 0.0

            for images, labels in batches(data, settings.batch_size, settings.augmentation, seed=settings.seed,
                                          epoch=epoch, first_step=progress.step):
                fraction = settings.fraction_done(epoch, progress.step, steps)
                set_rates(optimizers, settings, fraction)

                # Every process mixes alike, whatever their number; dropout is drawn per process.
                torch.manual_seed(derived_seed("model", settings.seed, epoch, progress.step))
                images, targets = map(processes.part, mix(images, labels, fraction))
                if processes.count > 1:
                    torch.manual_seed(derived_seed("model", settings.seed, epoch, progress.step, processes.rank))
                weight = len(images) * processes.count / len(labels)  # 1 if the batch divides evenly

                logits, loss = training_step(forward, optimizers, images, targets, loss_function, settings.precision,
                                             weight)

                # Count. In a mixed batch, a hit is the label with the larger share.
                hits = logits.argmax(1) == (targets if targets.ndim == 1 else targets.argmax(1))
                loss_sum += processes.sum(loss * len(images))
                correct_sum += processes.sum(hits.sum())
                progress.images += len(labels)
                progress.step += 1
                progress.seconds = time.perf_counter() - started
                bar.update(flops[epoch] / steps)

                # Twice a second: is the loss finite? Every few minutes, and before stopping: save a checkpoint.
                stopped, look = processes.max(stop.signal, time.monotonic() - looked_at > LOOK_EVERY)
                due = time.monotonic() - saved_at > 60 * settings.checkpoint_every
                if look or stopped or due:
                    looked_at = time.monotonic()
                    progress.loss, progress.correct = float(loss_sum), int(correct_sum)
                    show_progress(bar, progress, settings)
                    require_finite([loss_sum], "loss", run, progress)
                if stopped or due:
                    save_checkpoint(run, model, optimizers, progress)
                    saved_at = time.monotonic()
                if stopped:
                    raise Interrupted(stopped, f"checkpoint saved; resume with: {run.resume_command}")

            # The epoch is over: after the last one the final weights and batch norm's statistics, then validation, one
            # row of metrics.csv and one line.
            require_finite([loss_sum], "loss", run, progress)
            if epoch + 1 == settings.epochs:
                replace_by_average(optimizers)
                refresh_norms(model, data, settings.refresh_norms, seed=settings.seed)
            synchronize(device)
            progress.seconds = time.perf_counter() - started
            # The rate of the last step: a run that stopped right after it sets none when it resumes.
            set_rates(optimizers, settings, settings.fraction_done(epoch, steps - 1, steps))
            row = {"epoch": epoch + 1, "train_loss": loss_sum.item() / progress.images,
                   "train_acc": 100 * correct_sum.item() / progress.images,
                   **validate(model, val_split if processes.is_first else None),
                   "lr": optimizers[0].param_groups[0]["lr"], "seconds": round(progress.seconds, 3)}
            progress = Progress(epoch=epoch + 1, rows=[*progress.rows, row])
            loss_sum.zero_()
            correct_sum.zero_()
            run.log(progress.rows)
            if processes.is_first:
                after_epoch(row, settings)

        # Finish. The final weights are the result, not those of the best epoch.
        save_checkpoint(run, model, optimizers, progress)
        result = summarize(model, progress.rows, len(data), flops, settings, processes, machine,
                           resumed=saved is not None)
        run.finish(model, progress.rows, result)

        (stopped,) = processes.max(stop.signal)
        if stopped:  # after the last step: this run is complete, and another seed is not started
            run.print_result()
            raise Interrupted(stopped, f"{run.name} is finished, and no further run was started")
    return result


def training_step(
    model: nn.Module, optimizers: Optimizers, images: Tensor, targets: Tensor,
    loss_function: LossFunction, precision: str = "float32", weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step on a batch; returns the logits, [B, C], and the mean loss, a scalar, both detached.

    images: float32 [B, 3, 32, 32]; targets: class indices, int64 [B], or class shares, float32 [B, C]; weight: of this
    loss in the mean over processes, whose parts of a batch may differ by an image.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, precision):
        logits = model(images.contiguous(memory_format=torch.channels_last))
    loss = loss_function(logits.float(), targets)
    (loss * weight).backward()
    for optimizer in optimizers:
        optimizer.step()
    return logits.detach(), loss.detach()


def loss_of(settings: Settings) -> LossFunction:
    """Cross-entropy in nats, with label smoothing (Szegedy et al. 2015, arXiv 1512.00567)."""
    return partial(F.cross_entropy, label_smoothing=settings.label_smoothing)


def prepare(
    script: Script, settings: Settings, split: Split, processes: Processes = ALONE, *, quiet: bool = False,
    brief: bool = False,
) -> tuple[nn.Module, Settings, list[str]]:
    """A `new_model`, settings in which nothing is "auto", and the reasons for what was chosen.

    brief: as in `choose_threads`. Several processes divide the cores among them already. Raises UserError as
    `new_model` and `prepare_device` do.
    """
    automatic, settings = settings.threads == 0 and processes.count == 1, prepare_device(settings)
    on_cpu = settings.device == "cpu"
    if not quiet:
        timed = ", and timing float32 against bfloat16" if on_cpu and settings.precision == "auto" else ""
        processes.say(f"building the network{timed}")
    model = new_model(script, settings, split)
    chosen, *reasons = choose_precision(model, split, settings, processes)
    if automatic:
        chosen, reason = choose_threads(model, split, chosen, brief=brief)
        reasons.append(reason)
    if chosen.threads != settings.threads:  # it decides the last bits of the initial weights
        model = new_model(script, chosen, split)
    return model, chosen, [reason for reason in reasons if reason]


def new_model(script: Script, settings: Settings, split: Split, num_outputs: int | None = None) -> nn.Module:
    """The network of `settings`, placed by `fit_and_place`, with the initial weights of its seed or of `--init-from`.

    num_outputs: one per class of `split` by default. Raises UserError if this machine cannot train it, or if the
    weights are those of another network.
    """
    outputs = len(split.fine_names) if num_outputs is None else num_outputs
    require_memory(lambda: script.build_model(settings, outputs), settings.device)
    require_sides(script, settings)
    if settings.compile:
        require_compiler(settings.device)
    torch.manual_seed(derived_seed("init", settings.seed))
    model = fit_and_place(script.build_model(settings, outputs), split, settings)
    if settings.init_from:
        load_weights(model, settings.init_from)
    return model


def require_sides(script: Script, settings: Settings) -> None:
    """Raise UserError if the network cannot take images of a side that training scales them to."""
    with torch.device("meta"):  # shapes only
        model, image = script.build_model(settings, 1).eval(), torch.zeros(1, 3, 32, 32)
    for side in sorted({settings.side_in(epoch) or 0 for epoch in range(settings.epochs)}):
        set_side(model, side or None)
        try:
            with torch.no_grad():
                model(image)
        except RuntimeError as error:
            raise UserError(f"the network cannot take images of {side} pixels: use larger --sides ({error})") from error


def fit_and_place(model: Any, split: Split, settings: Settings) -> nn.Module:
    """The model on its device, in channels_last order, with its normalization fitted to the first training images."""
    model.fit_inputs(to_float(split.images[:INPUT_SAMPLE]))
    return model.to(settings.device, memory_format=torch.channels_last)


def load_weights(model: nn.Module, path: str) -> None:
    """Copy the weights in the file `path` into `model`. Raises UserError if they are those of another network."""
    try:
        model.load_state_dict(load_model(path).state_dict())
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit this network: give it the settings of their run") from error


def make_mix(settings: Settings, num_classes: int) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """A function that mixes a batch with itself, as `settings` say, by PyTorch's generator of random numbers.

    MixUp (Zhang et al. 2017, arXiv 1710.09412) mixes every batch, CutMix (Yun et al. 2019, arXiv 1905.04899) some
    batches until CUTMIX_SHARE of the training is over. Both mix each image with the one before it. CutMix pastes the
    same box in all of them; its area is drawn uniformly, before it is cut off at the edges. The function takes images,
    labels, int64 [B], and how much of the training is over, from 0 to 1; it returns mixed images and the shares of the
    classes, float32 [B, num_classes], or the given images and labels.
    """
    if not settings.mixup and not settings.cutmix:
        return lambda images, labels, fraction: (images, labels)
    from torchvision.transforms.v2 import CutMix, MixUp  # here, because importing torchvision takes a second

    if settings.mixup:
        mixup = MixUp(alpha=settings.mixup, num_classes=num_classes)
        return lambda images, labels, fraction: mixup(images, labels)
    cutmix = CutMix(num_classes=num_classes)

    def mix_some(images: Tensor, labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
        if fraction >= CUTMIX_SHARE or torch.rand(()) >= settings.cutmix:
            return images, labels
        return cutmix(images, labels)

    return mix_some


def refresh_norms(model: nn.Module, data: Split, count: int, *, seed: int) -> None:
    """Recompute batch norm's statistics from about `count` unaugmented training images, with the weights as they are.

    A running mean lags behind weights that still move, and has seen augmented images (Wu and Johnson 2021, arXiv
    2105.07576, section 3). With 0 images nothing happens.
    """
    if not count:
        return
    torch.manual_seed(derived_seed("refresh", seed))  # of dropout
    steps = math.ceil(min(count, len(data)) / REFRESH_BATCH)
    update_bn((batch for batch, _ in itertools.islice(
        batches(data, REFRESH_BATCH, Augmentation(), seed=seed, epoch=-1), steps)), model)


def validate(model: nn.Module, val_split: Split | None) -> dict[str, float | None]:
    """Loss and accuracy, in percent, on the validation set; None for both without one."""
    if val_split is None:
        return {"val_loss": None, "val_acc": None}
    logits = compute_logits(model, val_split.images)
    return {"val_loss": float(F.cross_entropy(logits, val_split.fine_labels)),
            "val_acc": 100 * float((logits.argmax(1) == val_split.fine_labels).float().mean())}


def save_checkpoint(run: Run, model: nn.Module, optimizers: Optimizers, progress: Progress) -> None:
    """Write a checkpoint, unless its weights are no longer finite: then UserError, and the last one is kept."""
    require_finite(model.state_dict().values(), "weights", run, progress)
    run.save_checkpoint(model, optimizers, progress)


def require_finite(tensors: Iterable[Tensor], what: str, run: Run, progress: Progress) -> None:
    """Raise UserError if a number in `tensors` is infinite or not a number."""
    if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return
    epoch = min(progress.epoch + 1, run.settings.epochs)
    raise UserError(f"the {what} of {run.name} is not finite (epoch {epoch}, step {progress.step}); "
                    "the last checkpoint, if there is one, is kept; try a smaller --lr or --precision float32")


# ---- Cost and progress ----------------------------------------------------------------------------------------------


def forward_flops(model: nn.Module) -> int:
    """FLOPs of the forward pass of one 32x32 image, a multiply-add counted as two, by PyTorch's own counter.

    Those on a CPU, wherever the model is: a GPU also multiplies the padding of small maps.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).cpu().eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def epoch_flops(model: nn.Module, num_images: int, settings: Settings) -> list[int]:
    """Training FLOPs, 3 x forward, of each epoch on `num_images` images. The model is left at the last epoch's side."""
    sides = [settings.side_in(epoch) for epoch in range(settings.epochs)]
    forward = {}
    for side in dict.fromkeys(reversed(sides)):
        set_side(model, side)
        forward[side] = forward_flops(model)
    set_side(model, sides[-1])
    return [3 * forward[side] * num_images for side in sides]


def summarize(model: nn.Module, rows: list[dict[str, Any]], num_images: int, flops: list[int], settings: Settings,
              processes: Processes, machine: dict[str, Any], *, resumed: bool) -> dict[str, Any]:
    """The content of `result.json` for a finished training with `num_images` images per epoch."""
    seen, seconds = num_images * settings.epochs, sum(row["seconds"] for row in rows)
    return {
        **{name: rows[-1][name] for name in ("train_loss", "train_acc", "val_loss", "val_acc")},
        "epochs": settings.epochs,
        "train_seconds": round(seconds, 2),
        "images_per_second": round(seen / seconds, 1),
        "train_flops": sum(flops),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_bytes": peak_memory(settings.device),
        "processes": processes.count,
        "resumed": resumed,
        "machine": {**machine, "threads": settings.threads * processes.count},
    }


def progress_bar(total: float, done: float, *, disable: bool) -> tqdm:
    """A bar in FLOPs rather than steps, because a step at 32 px takes longer than one at 16 px; on a terminal only."""
    return tqdm(total=total, initial=done, desc="starting", bar_format=BAR, disable=True if disable else None,
                mininterval=LOOK_EVERY, dynamic_ncols=True)


def show_progress(bar: tqdm, progress: Progress, settings: Settings) -> None:
    """Show the epoch with its mean loss and speed so far."""
    rate = progress.images / max(progress.seconds, 1e-9)
    bar.set_description_str(f"epoch {progress.epoch + 1}/{settings.epochs}", refresh=False)
    bar.set_postfix_str(f"{rate:,.0f} images/s, loss {progress.loss / progress.images:.2f}")


class StopRequest:
    """While the block lasts, a first signal of STOP_SIGNALS only sets `signal`.

    After a SIGINT or SIGTERM, the next of these two acts as it always does. The other signals are notices, not demands,
    and a lost terminal sends several: more of them change nothing. A signal that is ignored, as with nohup, or that is
    not Python's stays as it is.
    """

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
        taken = [number for number in numbers if number == signal.SIGINT
                 or signal.getsignal(number) not in (signal.SIG_IGN, None)]
        self._before = {number: signal.signal(number, self._note) for number in taken}
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signal = self.signal or number
        if number in (signal.SIGINT, signal.SIGTERM):
            self._restore(signal.SIGINT, signal.SIGTERM)

    def _restore(self, *numbers: int) -> None:
        for number in self._before.keys() & numbers:
            signal.signal(number, self._before[number])

    def __exit__(self, *exception: object) -> None:
        self._restore(*self._before)
