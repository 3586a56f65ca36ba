"""Download CIFAR-100 from the first source that is there, is fast enough and has the official images.

The official host is often slow, so mirrors come first. No source is trusted: `utils` compares the SHA-256 of all images
and labels before anything is put in place. What is there then is the official binary version.
"""

import http.client
import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from common.errors import UserError, warn
from common.files import flush_to_disk, lock
from common.text import printable
from dataset.classes import NUM_IMAGES
from dataset.formats import ARCHIVES, BINARY_FOLDER, Found, read_part, write_binary

NETWORK_TIMEOUT = 30.0  # seconds without a byte after which a download has failed
MIN_RATE, STALL_SECONDS = 200_000, 15.0  # below this many bytes/s for this long, the next source is tried
ATTEMPTS = 6  # connections per file: a server may close one early and be asked for the rest
MAX_BYTES = 300_000_000  # per file; the largest has 169 million
STAGING = ".download"  # folder in the data folder; it is kept as long as a download can be continued from it


@dataclass(frozen=True)
class Source:
    """The address of an archive, or those of the files that together are the dataset."""

    name: str
    urls: tuple[str, ...]

    @property
    def is_readable(self) -> bool:
        """Whether the packages are there that its files need."""
        return not self.urls[0].endswith(".parquet") or importlib.util.find_spec("pyarrow") is not None


BINARY = ("train.bin", "test.bin")
PARQUET = ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
HUGGING_FACE = "https://huggingface.co/datasets/uoft-cs/cifar100/resolve/main/cifar100/"
SOURCES = (
    Source("Hugging Face", tuple(HUGGING_FACE + file for file in PARQUET)),
    Source("fast.ai", ("https://s3.amazonaws.com/fast-ai-imageclas/cifar100.tgz",)),
    Source("the official host", ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",)),
)


class SourceFailed(Exception):
    """A source is not there, is too slow, or does not have the official images."""


class _TooSlow(SourceFailed):
    """The source may work if it is given more time."""


class _HungUp(SourceFailed):
    """The server closed the connection before the end of the file."""


def mirror(url: str) -> tuple[Source, ...]:
    """The sources at an address of one's own: an archive, or a folder with the binary version or Hugging Face's files.

    Raises UserError if it can be neither.
    """
    with suppress(ValueError):  # from urlsplit
        address = urlsplit(url)
        name = f"{address.netloc.rpartition('@')[2]}{address.path}"  # without a password
        if address.scheme in ("http", "https") and address.path.endswith((".tar.gz", ".tgz")):
            return (Source(name, (url,)),)
        if address.scheme in ("http", "https") and address.path.endswith("/"):
            return tuple(Source(name + files[0], tuple(url + file for file in files)) for files in (BINARY, PARQUET))
    raise UserError(f"{url!r} must start with http:// or https:// and end with .tar.gz, .tgz or, for a folder, /")


def download(data_dir: Path, first: Sequence[Source], check: Callable[[Found, str], Any]) -> None:
    """Put the binary version into `data_dir`, from the sources in `first` or else from the public ones.

    check: raises UserError unless a part is the official one; returns its `images`, `fine_labels` and `coarse_labels`.
    Raises UserError if no source works, OSError if the folder cannot be used.
    """
    staging = data_dir / STAGING
    staging.mkdir(exist_ok=True)
    held = lock(staging / ".lock", f"another process is downloading CIFAR-100 into {data_dir}: wait until it is done")
    try:
        if not (data_dir / BINARY_FOLDER).exists():  # else another process has just put it there
            own, public = ([source for source in sources if source.is_readable] for sources in (first, SOURCES))
            _from_first_that_works(own, public, staging, check)
            os.replace(staging / BINARY_FOLDER, data_dir / BINARY_FOLDER)
            flush_to_disk(data_dir)
        for folder in staging.glob("*/"):
            shutil.rmtree(folder)
    finally:
        held.release()
        with suppress(OSError):
            if {path.name for path in staging.iterdir()} <= {".lock"}:
                (staging / ".lock").unlink(missing_ok=True)
                staging.rmdir()


def _from_first_that_works(
    own: Sequence[Source], public: Sequence[Source], staging: Path, check: Callable[[Found, str], Any]
) -> None:
    """Make the folder of the binary version in `staging`. Raises UserError if no source works.

    One's own sources and the last public one are given their time. A slow one before it is continued if that one fails.
    """
    attempts = [(source, True) for source in own] + [(source, source == public[-1]) for source in public]
    print(f"CIFAR-100 is not in {staging.parent}: downloading it (up to 170 MB) from {attempts[0][0].name}", flush=True)
    for number, (source, patient) in enumerate(attempts, start=1):  # the list may grow
        folder = staging / re.sub(r"\W+", "-", source.name)
        folder.mkdir(exist_ok=True)
        try:
            for url in source.urls:
                _fetch(url, folder, patient)
            _convert(folder, staging / BINARY_FOLDER, check)
            return
        except SourceFailed as error:
            with suppress(OSError):
                folder.rmdir()  # if it is empty
            if isinstance(error, _TooSlow) and not patient:
                attempts.append((source, True))
            if number == len(attempts):
                raise UserError(
                    f"cannot download CIFAR-100 into {staging.parent} ({error}): check the network, put the files "
                    "there yourself (see data/README.md), or train with --synthetic") from error
            again = " again" if number >= len(own) + len(public) else ""
            warn(f"{source.name}: {error}; trying {attempts[number][0].name}{again}")


def _convert(folder: Path, target: Path, check: Callable[[Found, str], Any]) -> None:
    """Check what was downloaded into `folder` and write it to `target` as the binary version."""
    target.mkdir(exist_ok=True)
    try:
        for part in NUM_IMAGES:
            found = read_part(folder, part)
            if found is None:
                raise UserError(f"{folder} has no {part} images")
            split = check(found, part)
            write_binary(target / f"{part}.bin", split.images, split.fine_labels, split.coarse_labels)
            flush_to_disk(target / f"{part}.bin")
    except UserError as error:
        shutil.rmtree(folder)
        shutil.rmtree(target)
        problem = str(error).rpartition(": ")[0] or str(error)  # without the advice, which is for files of one's own
        raise SourceFailed(problem.replace(f"{folder}{os.sep}", "")) from error


# ---- One file -------------------------------------------------------------------------------------------------------


def _fetch(url: str, folder: Path, patient: bool) -> None:
    """Download a file into `folder`, or the rest of it if a part is there. Raises SourceFailed.

    patient: wait for a slow source. Otherwise one below MIN_RATE raises _TooSlow.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    path = folder / (ARCHIVES[-1] if name.endswith((".tar.gz", ".tgz")) else name)  # a name that `read_part` knows
    partial, version = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.version")
    if path.exists():
        return
    try:
        for _ in range(ATTEMPTS):
            start = partial.stat().st_size if partial.exists() and version.exists() else 0
            try:
                _receive(url, start, partial, version, name, patient)
                break
            except _HungUp:
                if partial.exists() and partial.stat().st_size > start:
                    continue
                if not start:
                    raise
                partial.unlink()  # it cannot be continued
        else:
            raise SourceFailed(f"the connection was lost {ATTEMPTS} times")
    except SourceFailed:
        if not (version.exists() and partial.exists() and partial.stat().st_size):  # nothing to continue
            partial.unlink(missing_ok=True)
            version.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    version.unlink(missing_ok=True)


def _receive(url: str, start: int, partial: Path, version: Path, title: str, patient: bool) -> None:
    """Append to `partial` from byte `start` on if the server still has the same `version` of it, else start again.

    version: a file with the ETag or the date by which the server recognizes what it has sent.
    """
    headers = {"User-Agent": "cifar100"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text(encoding="latin-1")}
    timeout = NETWORK_TIMEOUT if patient else min(NETWORK_TIMEOUT, STALL_SECONDS)
    with _network_errors():
        response = urlopen(Request(url, headers=headers), timeout=timeout)
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0
        total = None if response.length is None else start + response.length
        if (total or 0) > MAX_BYTES:
            raise SourceFailed(f"has {total:,} bytes")
        with (open(partial, "ab" if start else "wb") as file,
              tqdm(desc=title, total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar):
            _note_version(response.headers, version)
            for chunk in _chunks(response, 0 if patient else MIN_RATE):
                if file.tell() + len(chunk) > MAX_BYTES:
                    version.unlink(missing_ok=True)  # there is nothing to continue
                    raise SourceFailed(f"has more than {MAX_BYTES:,} bytes")
                file.write(chunk)
                bar.update(len(chunk))
            received = file.tell()
    if total is not None and received < total:
        raise _HungUp("the connection was closed early")


def _note_version(headers: Any, version: Path) -> None:
    """Keep what If-Range needs: a strong ETag, else a date; without either, a download cannot be continued."""
    tag = headers.get("ETag", "W/")
    tag = headers.get("Last-Modified", "") if tag.startswith("W/") else tag
    if tag and tag.isascii() and tag.isprintable():
        version.write_text(tag, encoding="latin-1")
    else:
        version.unlink(missing_ok=True)


def _chunks(response: Any, min_rate: int) -> Iterator[bytes]:
    """The content as it arrives. Raises _TooSlow if less than `min_rate` bytes/s arrive for STALL_SECONDS."""
    since, received = time.monotonic(), 0
    while True:
        with _network_errors():
            chunk = response.read1(2**16)  # unlike `read`, it does not wait until all of it has arrived
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        seconds = time.monotonic() - since
        if seconds >= STALL_SECONDS:
            if received < min_rate * seconds:
                raise _TooSlow(f"only {received / seconds / 1000:.0f} kB/s")
            since, received = time.monotonic(), 0


@contextmanager
def _network_errors() -> Iterator[None]:
    """Turn whatever the network raises into SourceFailed, so that errors of the disk remain errors of the disk."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an address with odd characters
        reason = getattr(error, "reason", None) or error  # of a URLError: another error
        words = getattr(reason, "strerror", None) or reason
        cannot_continue = getattr(error, "code", None) == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        hung_up = isinstance(error, (ConnectionError, http.client.IncompleteRead)) or cannot_continue
        kind = _HungUp if hung_up else _TooSlow if isinstance(error, TimeoutError) else SourceFailed
        raise kind(printable(str(words))) from error
