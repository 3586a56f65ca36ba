"""Search the settings of a recipe with many short trainings, judged on the validation set alone.

    python -m tools.tune mlp                             # 20 trials of the MLP; run it again to add 20 more
    python -m tools.tune cnn --trials 50 --timeout 120   # start no trial after two hours
    python -m tools.tune mlp --trials 0                  # only print and draw the results so far
    python -m tools.tune mlp --synthetic --trials 3      # a separate search, runs anywhere: nothing to download

The first trial is the recipe itself. The next ones draw settings at random (Bergstra and Bengio 2012), then with TPE
(Bergstra et al. 2011), all in Optuna (Akiba et al. 2019, arXiv 1907.10902; requirements-extra.txt installs it). In the
second half of its epochs, a trial below the median of the others is pruned (Golovin et al. 2017). After Ctrl-C, run
the same command to resume the search from results/tune/<mlp|cnn>[-synthetic]/journal.log.

A trial is a short training, while settings that prevent memorizing (crop, MixUp, jitter) pay off only in long ones. On
5,000 images the standard error is 0.7 points, and chance flatters the best of many trials. Try the result in a full
run before you believe it.
"""

import json
import math
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import train_cnn
import train_mlp
from common.command_line import Parser, exit_status
from common.errors import Interrupted, UserError
from common.files import lock
from common.plotting import BLUE, ORANGE, WIDTH, new_figure, only_warning, save_figure
from training.distributed import ALONE
from training.hardware import choose_precision, prepare_device
from training.loop import new_model, train
from training.run_folder import NullRun
from training.settings import Script, Settings, flag_of
from utils import Split, derived_seed, load_cifar100


@dataclass(frozen=True)
class Range:
    """The values of a setting to search, both ends included; integers if both ends are.

    log: uniform on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Search:
    """A search around the first recipe of `script`, which the settings `short` make shorter.

    space: the range of each setting that is varied; it includes the recipe's own value.
    """

    script: Script
    short: dict[str, Any]
    space: dict[str, Range]

    def settings(self, **changes: Any) -> Settings:
        """The settings of a trial of the recipe itself."""
        return self.script.recipe_settings(next(iter(self.script.recipes)), **{**self.short, **changes})


SEARCHES = {
    "mlp": Search(
        train_mlp.SCRIPT,
        dict(epochs=6),  # a tenth of the recipe: a minute on two CPU cores
        {
            "batch_size": Range(500, 4000, log=True),  # large ones, because Muon itself costs the same per step
            "lr": Range(0.005, 0.2, log=True),  # Muon's; only 0.02 and 0.03 were tried before
            "other_lr": Range(3e-4, 0.03, log=True),  # raised together with the batch size, never alone
            "momentum": Range(0.7, 0.98),  # never tuned; 0.95 in Jordan et al.
            "warmup": Range(0.0, 0.3),  # halved once, without a run to compare
            "label_smoothing": Range(0.0, 0.3),  # never tuned
            "crop": Range(0, 5),  # 2 to 4 were tried
            "mixup": Range(0.0, 1.0),  # 0.4 to 1.0 were tried; 1.0 was too much for 16 epochs
        },
    ),
    "cnn": Search(
        train_cnn.SCRIPT,
        dict(epochs=3, sides=(20,)),  # less than a quarter of what `fast` costs
        {
            "batch_size": Range(128, 512, log=True),  # 128 and 1024 were tried, with other rates, and were worse
            "lr": Range(0.04, 0.4, log=True),  # NorMuon's, the angle of a step; 0.16 was worse
            "other_lr": Range(0.1, 1.0, log=True),  # of head and shifts; 0.6 was no better
            "momentum": Range(0.3, 0.95),  # NorMuon's; 0.8 with a smaller learning rate was no better
            "warmup": Range(0.0, 0.4),  # never tuned
            "label_smoothing": Range(0.0, 0.4),  # 0.2 and 0.25 were tried
            "crop": Range(0, 5),  # 2 and 3 were tried
            "jitter": Range(0.0, 0.4),  # 0 and 0.2 were tried
        },
    ),
}

RANDOM_FIRST = 10  # trials, including the recipe, before TPE takes over
MIN_FOR_PRUNING = 4  # finished trials before one can be pruned
MIN_FOR_IMPORTANCE = 8  # finished trials before importance is computed; it is still rough at 20
TOP = 0.25  # share of finished trials that count as the best when importance is computed


# ---- A trial --------------------------------------------------------------------------------------------------------


def trial_settings(base: Settings, params: dict[str, Any]) -> Settings:
    """`base` with the values that Optuna proposes, rounded to three digits so that they fit on a command line."""
    return replace(base, **{name: type(value)(float(f"{value:.3g}")) for name, value in params.items()})


def propose(trial: Any, space: dict[str, Range]) -> dict[str, Any]:
    """A value for every setting of `space`, from the search's sampler."""
    return {name: (trial.suggest_int if isinstance(values.low, int) else trial.suggest_float)(
        name, values.low, values.high, log=values.log) for name, values in space.items()}


def run_trial(trial: Any, search: Search, base: Settings, train_split: Split, val_split: Split) -> float:
    """Train a trial and return its validation accuracy in percent; all trials have the same seed.

    Raises optuna.TrialPruned if the trial falls behind or its loss is no longer finite, and Interrupted.
    """
    import optuna

    def judge(row: dict[str, Any], settings: Settings) -> None:
        trial.report(row["val_acc"], row["epoch"])
        if row["epoch"] < settings.epochs and trial.should_prune():
            raise optuna.TrialPruned

    settings = trial_settings(base, propose(trial, search.space))
    model = new_model(search.script, settings, train_split)
    run = NullRun(f"trial {trial.number}", settings)  # the printed command can train it again
    try:
        return train(model, train_split, val_split, run, quiet=True, after_epoch=judge)["val_acc"]
    except UserError as error:
        trial.set_user_attr("diverged", str(error))
        raise optuna.TrialPruned from error  # TPE learns from pruned trials, not from failed ones


def outcome(trial: Any) -> str:
    return "finished" if trial.state.name == "COMPLETE" else "diverged" if "diverged" in trial.user_attrs else "pruned"


def trial_line(trial: Any, base: Settings) -> str:
    result = outcome(trial)
    if trial.last_step is not None:
        result += f" at {trial.intermediate_values[trial.last_step]:.2f}% after epoch {trial.last_step}"
    settings = trial_settings(base, trial.params)
    chosen = ", ".join(f"{name} {getattr(settings, name):g}" for name in trial.params)
    return f"trial {trial.number}: {result}, {trial.duration.total_seconds():.0f} s; {chosen}"


# ---- The search -----------------------------------------------------------------------------------------------------


def open_study(folder: Path, search: Search, base: Settings) -> Any:
    """The Optuna study in `folder`, or a new one.

    Raises UserError if Optuna is missing, the journal is damaged, or the search was started with other settings.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
    except ImportError:
        raise UserError("a search needs Optuna, which is not installed: "
                        "pip install -r requirements-extra.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.MedianPruner(MIN_FOR_PRUNING, n_warmup_steps=(base.epochs + 1) // 2)
    journal = folder / "journal.log"
    lock_file = JournalFileOpenLock(str(journal))  # the default one needs privileges on Windows
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal), lock_obj=lock_file)), study_name="tune",
            direction="maximize", load_if_exists=True, pruner=pruner)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{journal} is damaged ({error}): delete it to start the search again") from error
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a process that was killed
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    fixed = {f.name: getattr(base, f.name) for f in fields(base) if not f.metadata["machine"]}
    fixed |= {f"the range of {name}": f"{r.low:g} to {r.high:g}" for name, r in search.space.items()}
    fixed = json.loads(json.dumps(fixed))  # as the journal returns it
    if not usable(study):
        study.set_user_attr("fixed", fixed)
    before = study.user_attrs["fixed"]
    for name in fixed | before:
        if fixed.get(name) != before.get(name):
            raise UserError(f"the search in {folder} was started with {name} {before.get(name)}, not "
                            f"{fixed.get(name)}: use that, or start another search with --results-dir")
    return study


def usable(study: Any) -> list[Any]:
    """The trials that ended by themselves, in order: finished, pruned or diverged."""
    from optuna.trial import TrialState

    return study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])


def finished(study: Any) -> list[Any]:
    return [trial for trial in usable(study) if outcome(trial) == "finished"]


def run_trials(study: Any, search: Search, base: Settings, trials: int, minutes: float) -> None:
    """Add `trials` trials to the study and print a line for each; none starts after `minutes`. Raises Interrupted.

    The sampler's seed depends on the number of earlier trials, so an interrupted and resumed search tries the same
    settings as an uninterrupted one.
    """
    from optuna.samplers import TPESampler

    end = time.monotonic() + 60 * minutes
    train_split, val_split = load_cifar100(base.data_folder, use_synthetic=base.synthetic)
    base = prepare_device(base)
    model = new_model(search.script, base, train_split)
    base, _ = choose_precision(model, train_split, base, ALONE)
    print(f"{trials} trials of {base.epochs} epochs on {len(train_split):,} {base.dataset}, {base.precision} on "
          f"{base.device} with {base.threads} threads; accuracy is measured on {len(val_split):,} validation images",
          flush=True)
    for _ in range(trials):
        if time.monotonic() > end:
            break
        done = len(usable(study))
        if not done:
            study.enqueue_trial({name: getattr(base, name) for name in search.space})
        seed = derived_seed("tune", base.seed, done) % 2**32
        study.sampler = TPESampler(n_startup_trials=RANDOM_FIRST, seed=seed)
        study.optimize(lambda trial: run_trial(trial, search, base, train_split, val_split), n_trials=1)
        print(trial_line(usable(study)[-1], base), flush=True)


def importances(study: Any) -> dict[str, float]:
    """The importance of each setting for being among the best trials, as shares of 1, largest first; {} if too early.

    Computed with PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), the one method of Optuna's without scikit-learn.
    """
    if len(finished(study)) < MIN_FOR_IMPORTANCE:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP))


def summary(study: Any, search: Search, base: Settings, shares: dict[str, float]) -> str:
    """The result of a search with at least one finished trial, as text."""
    best, done = study.best_trial, finished(study)
    kinds = Counter(map(outcome, usable(study)))
    recipe = [trial.value for trial in done if trial_settings(base, trial.params) == base]
    compared = f"; the recipe itself: {recipe[0]:.2f}%" if recipe else ""
    command = search.script.command_for(trial_settings(base, best.params))
    if base.data_dir:
        command += " " + shlex.join(["--data-dir", base.data_dir])
    lines = [
        ", ".join(f"{kinds[kind]} {kind}" for kind in ("finished", "pruned", "diverged")),
        f"best: trial {best.number} with {best.value:.2f}% on validation images{compared}",
        f"    {command}",
        f"this is as short as a trial; for a full training, omit {' and '.join(map(flag_of, search.short))}",
    ]
    if shares:
        lines += [f"importance of each setting for being among the best {TOP:.0%} of {len(done)} finished trials:",
                  *(f"    {name:<16} {100 * share:3.0f}%" for name, share in shares.items())]
    else:
        lines += [f"the importance of each setting is printed after {MIN_FOR_IMPORTANCE} finished trials"]
    return "\n".join(lines)


# ---- Figures --------------------------------------------------------------------------------------------------------


def history_figure(study: Any, title: str, *, synthetic: bool = False) -> Any:
    """The accuracy of each trial that did not diverge, and the best so far, as a matplotlib Figure."""
    figure = new_figure(WIDTH, 3.6, f"Search history, {title}", synthetic=synthetic)
    axes = figure.subplots()
    done = finished(study)
    pruned = [trial for trial in usable(study) if outcome(trial) == "pruned"]
    numbers, values = [trial.number for trial in done], [trial.value for trial in done]
    best = [max(values[:count + 1]) for count in range(len(values))]
    last = usable(study)[-1].number
    axes.step([*numbers, last], [*best, best[-1]], where="post", color=BLUE, lw=1.3, label="best so far")
    axes.plot(numbers, values, "o", color=BLUE, ms=5, label="finished")
    if pruned:
        axes.plot([trial.number for trial in pruned], [trial.value for trial in pruned], "x", color=ORANGE, ms=6,
                  label="pruned, at its last epoch")
    axes.set(xlabel="trial (0: the recipe itself)", ylabel="validation top-1 accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def importance_figure(shares: dict[str, float], title: str, *, synthetic: bool = False) -> Any:
    """The shares of `importances` as bars, as a matplotlib Figure."""
    figure = new_figure(WIDTH, 3.6, f"Importance of settings, {title}", synthetic=synthetic)
    axes = figure.subplots()
    names = list(shares)[::-1]
    bars = axes.barh(names, [100 * shares[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="%.0f%%", padding=3)
    axes.set(xlabel=f"importance for being among the best {TOP:.0%} (% of the total)", ylabel="setting")
    axes.margins(x=0.08)
    axes.grid(alpha=0.3, axis="x")
    return figure


def report(study: Any, search: Search, base: Settings, folder: Path) -> None:
    """Print and draw the result so far."""
    done = finished(study)
    if not done:
        print("no trial has finished yet")
        return
    shares = importances(study)
    title = f"recipe {base.recipe} (epochs: {base.epochs}, finished trials: {len(done)})"
    with only_warning(folder / "history.png"):
        save_figure(history_figure(study, title, synthetic=base.synthetic), folder / "history.png")
    if shares:
        with only_warning(folder / "importance.png"):
            save_figure(importance_figure(shares, title, synthetic=base.synthetic), folder / "importance.png")
    print(summary(study, search, base, shares))
    print(f"journal and figures are in {folder}", flush=True)


# ---- The command ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m tools.tune", description=__doc__)
    parser.add_argument("script", choices=tuple(SEARCHES), metavar="|".join(SEARCHES), help="the network to tune")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="trials to add (default: 20)")
    parser.add_argument("--timeout", type=float, default=math.inf, metavar="MINUTES",
                        help="start no trial after this time (default: no limit)")
    epochs = " and ".join(f"{search.short['epochs']} for {name}" for name, search in SEARCHES.items())
    parser.add_argument("--epochs", type=int, metavar="N", help=f"epochs per trial (default: {epochs})")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="seed of the search and of every trial (default: 0)")
    parser.add_synthetic()
    parser.add_data_dir()
    parser.add_results_dir(help="the search is kept in tune/ there (default: results/)")
    options = parser.parse_args(argv)
    if options.trials < 0 or not options.timeout > 0:
        raise UserError("--trials must be at least 0, and --timeout above 0")
    search = SEARCHES[options.script]
    folder = options.results_dir / "tune" / (options.script + ("-synthetic" if options.synthetic else ""))
    given = {"epochs": options.epochs} if options.epochs is not None else {}
    base = search.settings(seed=options.seed, synthetic=options.synthetic, data_dir=options.data_dir, **given)
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder / ".lock", f"the search in {folder} is in use by another process; wait for it or stop it")
    try:
        study, status = open_study(folder, search, base), 0
        try:
            if options.trials:
                run_trials(study, search, base, options.trials, options.timeout)
        except (Interrupted, KeyboardInterrupt) as stop:
            status = getattr(stop, "status", 130)
            print("\nstopped; to resume the search, run the same command", flush=True)
        report(study, search, base, folder)
    finally:
        held.release()
    return status


if __name__ == "__main__":
    sys.exit(exit_status(main))
