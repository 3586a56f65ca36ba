"""Command lines, and how a command ends: an error that the user can correct is one line on stderr and status 2."""

import argparse
import codecs
import errno
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from common.errors import Interrupted, UserError, reason, say_on_stderr
from common.files import RESULTS_DIR, ROOT
from common.text import degrade
from models import WeightsError

MAX_MESSAGE = 400  # characters of an error message of argparse, which repeats the argument
CLOSED_PIPE = 141  # 128 + SIGPIPE, which Windows does not have


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, and whose help keeps the lines of a docstring."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_results_dir(self, help: str = "folder of all runs (default: results/)") -> None:
        """`--results-dir`, the same in every command."""
        self.add_argument("--results-dir", type=absolute_path, default=RESULTS_DIR, metavar="FOLDER", help=help)

    def add_data_dir(self) -> None:
        """`--data-dir`, the same in every command; "" leaves it to `utils.default_data_dir`."""
        self.add_argument("--data-dir", type=_absolute_or_empty, default="", metavar="FOLDER",
                          help="folder of the dataset (default: $CIFAR100_DIR, else data/)")

    def add_device(self, help: str) -> None:
        """`--device`, the same in every command that only runs networks."""
        self.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=help)

    def add_synthetic(self) -> None:
        """`--synthetic`, the same in every command that works on any images."""
        self.add_argument("--synthetic", action="store_true", help="use procedurally drawn images instead of CIFAR-100")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as argparse does, but raise UserError for a value that is empty or that a path cannot hold.

        An unset shell variable leaves an empty value behind, and a folder named "" would be the current one.
        """
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "=", word)
            if equals and (not value or "\0" in value or (flag and value == "--")):
                self.error(f"{flag or 'an argument'} has no usable value ({value!r}): give one")
        codecs.register_error("degrade", degrade)
        for stream in (sys.stdout, sys.stderr):  # they may be ASCII, and file names may hold bytes that are not text
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="degrade")
        return super().parse_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse would ignore a full disk

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message if len(message) < MAX_MESSAGE else message[:MAX_MESSAGE] + ' ...'} (see --help)")


def integers(text: str) -> tuple[int, ...]:
    """The type of an argument such as 0,1,2."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of integers such as 0,1,2") from None


def absolute_path(text: str) -> Path:
    """The type of an argument that names a file or folder for later, when the current folder may be another one."""
    try:
        return expanded_path(text).absolute()
    except FileNotFoundError as error:
        raise UserError(f"{text!r} is relative to the current folder, which is gone: change to another one") from error


def png_path(text: str) -> Path:
    """The type of an argument that names a PNG file to write, in a folder that exists."""
    path = absolute_path(text)
    if path.suffix != ".png" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must name a .png file in an existing folder, not {path}")
    return path


def expanded_path(text: str) -> Path:
    """The type of an argument that names a file or folder for now, with `~` expanded."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text!r} names the home folder of an unknown user") from error


def _absolute_or_empty(text: str) -> str:
    """`absolute_path` as text, except for an empty default, which argparse converts too."""
    return str(absolute_path(text)) if text else ""


def next_command(command: Sequence[str], results_dir: Path) -> str:
    """The words of `command` as they are typed in the current folder, with `--results-dir` if not the default."""
    here = os.path.samefile(os.curdir, ROOT)  # works in a folder that is gone, unlike Path.cwd
    ours = (".py", ".png")  # scripts, and the image that is classified first
    words = [str(ROOT / word) if word.endswith(ours) and not here else word for word in command]
    where = [] if results_dir.resolve() == RESULTS_DIR else ["--results-dir", str(results_dir)]
    return shlex.join([*words, *where])


def launched() -> tuple[int, int]:
    """This process's rank and the number of processes that torchrun started: (0, 1) without torchrun."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def say(line: str) -> None:
    """Print a line at once. A terminal that is gone, as after a lost connection, takes nothing and fails nothing."""
    try:
        print(line, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        _discard(sys.stdout)


def _discard(stream: Any) -> None:
    """Discard what is still in the stream and what is written later: Python flushes it at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_status(main: Callable[[], int]) -> int:
    """Run a command's `main` and return its exit status: 2, with one line on stderr, for what the user can correct.

    A process that has joined others ends here. Python's usual shutdown sometimes aborts while threads of gloo still
    hold tensors (PyTorch's pull request 179291).
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file opened would be a standard stream
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as with >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
    status = _run(main)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # as after a lost connection; an error here would replace the status
            _discard(stream)
    if dist.is_initialized():
        os._exit(status)
    return status


def _run(main: Callable[[], int]) -> int:
    rank, count = launched()
    try:
        try:
            status = main()
        except Interrupted as stop:
            status = stop.status
            if rank == 0:
                say(f"\n{stop}")
        print(end="", flush=True)  # a full disk or a closed pipe can still be reported here
        return status
    except (UserError, WeightsError) as error:
        message = str(error)
    except BrokenPipeError:  # whatever read the output has ended, as with `| head`
        _discard(sys.stdout)
        return CLOSED_PIPE
    except OSError as error:
        message = f"{error.filename or 'a file or the output'}: {reason(error)}"
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        message = "the device ran out of memory: try --device cpu or, in a training, a smaller --batch-size"
    except KeyboardInterrupt:
        say_on_stderr("stopped")
        return 128 + signal.SIGINT
    source = "error" if count == 1 or rank == 0 else f"error in process {rank} of {count}"
    say_on_stderr(f"{source}: {message}")
    return 2
