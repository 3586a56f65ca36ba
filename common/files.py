"""Files that are written whole or not at all, JSON and CSV, and a lock. Importing this needs no POSIX module."""

import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from common.errors import UserError, reason, warn

ROOT = Path(__file__).resolve().parents[1]
RESULTS_DIR = ROOT / "results"
PARTIAL = ".partial"  # suffix of a file that is being written
UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # by some network file systems
MAX_JSON_BYTES = 2**24  # far above the size of any JSON file here


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end of the block it replaces `path`, unless anything failed.

    Raises UserError if it cannot be written; `path` is unchanged then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        try:
            yield partial
            flush_to_disk(partial)
            os.replace(partial, path)
            flush_to_disk(path.parent)  # the folder holds the file's name
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path} ({reason(error)}); existing files are unchanged") from error


def flush_to_disk(path: Path) -> None:
    """Write the system's buffers for a file or folder to the disk, so that it survives a power cut."""
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened on Windows
        return
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # one may be allowed to write into a folder and not to list it
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def require_file(path: Path) -> None:
    """Raise UserError unless `path` is a regular file: reading from a pipe or device may never end."""
    if not path.is_file():
        raise UserError(f"{path} is {'not a file' if path.exists() else 'missing'}")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError if the file is missing or damaged."""
    require_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} has more than {MAX_JSON_BYTES:,} bytes; was it edited?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); was it edited?") from None


def lock(path: Path, in_use: str) -> BaseFileLock:
    """A lock on `path`, held until its `release()`. Raises UserError(in_use) if another process holds it.

    Some network file systems have no locks: there this only warns.
    """
    held = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise UserError(in_use) from None
    except (OSError, NotImplementedError) as error:  # the latter from older versions of filelock
        if isinstance(error, OSError) and error.errno not in {*UNSUPPORTED, errno.ENOLCK}:
            raise UserError(f"cannot lock {path} ({reason(error)})") from error
        warn(f"{path.parent} is on a file system without locks ({error}): do not use it in two processes at once")
    return held
