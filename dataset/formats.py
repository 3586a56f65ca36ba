"""The forms in which people have CIFAR-100, each read where it lies: nothing is unpacked into or written to a folder.

Nothing here decides whether the images are the official ones: `utils` does, by their content. So a file may come from
anywhere. What a damaged or hostile one can do is bounded: every size is known before memory is allocated, names in
an archive are compared and never used as paths, and only files with the official MD5 are unpickled (by torchvision).
"""

import gzip
import io
import itertools
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from dataset.classes import COARSE_NAMES, COARSE_OF_FINE, FINE_NAMES, NUM_IMAGES

RECORD_BYTES = 2 + 3 * 32 * 32  # coarse label, fine label, then the red, green and blue planes
BINARY_FOLDER, PYTHON_FOLDER = "cifar-100-binary", "cifar-100-python"
PYTHON_FILES = ("meta", "train", "test")  # torchvision wants all three
FAST_AI = "cifar100"  # the folder of fast.ai's archive; also that of Hugging Face's files
ARCHIVES = (f"{BINARY_FOLDER}.tar.gz", f"{PYTHON_FOLDER}.tar.gz", f"{FAST_AI}.tgz")
MAX_UNPACKED = 500_000_000  # bytes; the largest archive has 280 million
UNPACK_AGAIN = "unpack the official archive again"  # advice at the end of messages
MOVE_AWAY = "move it away to download CIFAR-100"
ADD_THE_OTHER = "add that part, or move the other away to download both"


class Found(NamedTuple):
    """Images, uint8 [N, 3, 32, 32], and labels, int64 [N], as a file at `source` has them: nothing is checked yet.

    advice: what the user can do if they are not the official ones.
    """

    images: Tensor
    fine_labels: Tensor
    coarse_labels: Tensor
    source: Path
    advice: str = UNPACK_AGAIN


def read_part(data_dir: Path, part: str) -> Found | None:
    """Read `part` ("train" or "test") in the first form that `data_dir` has; None if it has none.

    Raises UserError if files are missing or cannot be read, OSError if the folder cannot.
    """
    for folder in _places(data_dir, BINARY_FOLDER):
        if is_there(folder / f"{part}.bin"):
            return _read_binary(folder / f"{part}.bin", part)
    for folder in _places(data_dir, PYTHON_FOLDER):
        if all(is_there(folder / name) for name in PYTHON_FILES):
            return _read_python(folder, part, folder, f"{UNPACK_AGAIN}, or delete that folder to download it")
    for name in ARCHIVES:
        if is_there(data_dir / name):
            return _read_archive(data_dir / name, part)
    if files := _parquet_files(data_dir, part):
        return _read_parquet(files, part)
    if classes := _class_folder(data_dir, part):
        pngs = ((path.parent.name, str(path), path.read_bytes())
                for pattern in ("*/*.png", "*/*/*.png") for path in classes.glob(pattern))
        return _decode(pngs, part, classes)
    _refuse_incomplete(data_dir, part)
    return None


def is_there(path: Path) -> bool:
    """Like `Path.exists`, but raises OSError if the folder may not be read; newer Pythons return False then."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _places(data_dir: Path, name: str) -> tuple[Path, ...]:
    """Folders that may hold the files of an archive's folder `name`: it, it unpacked into itself, `data_dir` itself."""
    return data_dir / name, data_dir / name / name, data_dir


def _parquet_files(data_dir: Path, part: str) -> list[Path]:
    """Hugging Face's files of a part, from the first folder that has any."""
    folders = data_dir, data_dir / FAST_AI, data_dir / "data"
    return next(filter(None, (sorted(folder.glob(f"{part}-*.parquet")) for folder in folders)), [])


def _class_folder(data_dir: Path, part: str) -> Path | None:
    """The folder of a part's PNGs. It has a subfolder with the name of a class, since `train` may be any folder."""
    return next((folder for folder in (data_dir / part, data_dir / FAST_AI / part) if folder.is_dir()
                 and any(path.name in (*FINE_NAMES, *COARSE_NAMES) for path in folder.iterdir())), None)


def _refuse_incomplete(data_dir: Path, part: str) -> None:
    """Raise UserError if `data_dir` has some of the files: downloading would only hide the mistake."""
    for name, needed in ((BINARY_FOLDER, (f"{part}.bin",)), (PYTHON_FOLDER, PYTHON_FILES)):
        for folder in reversed(_places(data_dir, name)):
            others = ("train.bin", "test.bin") if name == BINARY_FOLDER else ()  # `train` may be any folder
            if is_there(folder) and (folder.name == name or any(is_there(folder / other) for other in others)):
                missing = [file for file in needed if not is_there(folder / file)]
                raise UserError(f"{folder} has no {' and no '.join(missing)}: {UNPACK_AGAIN}")
    other = "test" if part == "train" else "train"
    if files := _parquet_files(data_dir, other):
        raise UserError(f"{files[0].parent} has {other}-*.parquet, but no {part}-*.parquet: {ADD_THE_OTHER}")
    if classes := _class_folder(data_dir, other):
        raise UserError(f"{classes} has images by class, but {classes.with_name(part)} has none: {ADD_THE_OTHER}")


# ---- The official versions ------------------------------------------------------------------------------------------


def _read_binary(path: Path, part: str) -> Found:
    _require_size(path.stat().st_size, part, path, UNPACK_AGAIN)
    return _from_records(np.fromfile(path, dtype=np.uint8), path, UNPACK_AGAIN)


def _require_size(size: int, part: str, path: Path, advice: str) -> None:
    expected = NUM_IMAGES[part] * RECORD_BYTES
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes instead of {expected:,}: {advice}")


def _from_records(content: np.ndarray, source: Path, advice: str) -> Found:
    records = content.reshape(-1, RECORD_BYTES)
    images = torch.from_numpy(records[:, 2:].reshape(-1, 3, 32, 32))
    coarse_labels, fine_labels = torch.from_numpy(records[:, :2].astype(np.int64).T.copy())
    return Found(images.contiguous(), fine_labels, coarse_labels, source, advice)


def write_binary(path: Path, images: Tensor, fine_labels: Tensor, coarse_labels: Tensor) -> None:
    """Write a part to `path` as the official binary version has it."""
    records = np.empty((len(images), RECORD_BYTES), dtype=np.uint8)
    records[:, 0], records[:, 1], records[:, 2:] = coarse_labels, fine_labels, images.flatten(1)
    records.tofile(path)


def _read_python(folder: Path, part: str, source: Path, advice: str) -> Found:
    """Read the python version in `folder`, whatever its name."""
    from torchvision.datasets import CIFAR100  # here, because importing torchvision takes a second

    class Unpacked(CIFAR100):
        base_folder = folder.name

    try:
        official = Unpacked(str(folder.parent), train=part == "train")
    except RuntimeError as error:  # torchvision compares each file's MD5 before unpickling it
        raise UserError(f"{source} is damaged (its MD5 sums do not match): {advice}") from error
    return _with_superclasses(official.data, official.targets, source, advice)


def _with_superclasses(pixels: np.ndarray, fine: list[int], source: Path, advice: str) -> Found:
    """Pixels, uint8 [N, 32, 32, 3], and fine labels, with the coarse labels that belong to these."""
    fine_labels = torch.tensor(fine, dtype=torch.int64)
    coarse_labels = torch.tensor(COARSE_OF_FINE)[fine_labels.clamp(0, len(FINE_NAMES) - 1)]
    return Found(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).contiguous(), fine_labels, coarse_labels, source,
                 advice)


# ---- Archives -------------------------------------------------------------------------------------------------------


class _Limited(gzip.GzipFile):
    """A file that ends with an error after MAX_UNPACKED bytes: a small archive may unpack to any size."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if self.tell() > MAX_UNPACKED:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_UNPACKED:,} bytes")
        return content


def _read_archive(path: Path, part: str) -> Found:
    """Read a .tar.gz of the binary version, of the python version, or of PNGs in folders by class, unpacking nothing.

    The first member that belongs to one of the three decides which it is.
    """
    try:
        with _Limited(path) as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=2**20) as archive:
            files = (member for member in archive if member.isreg())
            for member in files:
                name = PurePosixPath(member.name)
                if name.name == f"{part}.bin":
                    _require_size(member.size, part, path / member.name, MOVE_AWAY)
                    return _from_records(np.frombuffer(_content(archive, member), np.uint8).copy(), path, MOVE_AWAY)
                if name.name in PYTHON_FILES:
                    return _read_python_archive(archive, itertools.chain([member], files), part, path)
                if _is_png(name, part):
                    pngs = _pngs(archive, itertools.chain([member], files), part)
                    return _decode(pngs, part, path)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): {MOVE_AWAY}") from error
    raise UserError(f"{path} has no {part}.bin, no python version and no {part} images: {MOVE_AWAY}")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a file in the archive. A sparse one, which no dataset has, may claim any size."""
    if member.size > MAX_UNPACKED or member.issparse():
        raise tarfile.ReadError(f"{member.name} is sparse or too large")
    stream = archive.extractfile(member)
    assert stream is not None  # it is a regular file
    return stream.read()


def _read_python_archive(archive: tarfile.TarFile, files: Iterable[tarfile.TarInfo], part: str, source: Path) -> Found:
    """Read the python version from its archive, through a temporary folder, since torchvision reads only files."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / PYTHON_FOLDER
        folder.mkdir()
        for member in files:
            name = PurePosixPath(member.name).name
            if name in PYTHON_FILES:
                (folder / name).write_bytes(_content(archive, member))  # one of three names, never the archive's own
        return _read_python(folder, part, source, MOVE_AWAY)


def _is_png(name: PurePosixPath, part: str) -> bool:
    return name.suffix == ".png" and part in name.parts[:-2]


def _pngs(archive: tarfile.TarFile, files: Iterable[tarfile.TarInfo], part: str) -> Iterator[tuple[str, str, bytes]]:
    for member in files:
        name = PurePosixPath(member.name)
        if _is_png(name, part):
            yield name.parent.name, member.name, _content(archive, member)


# ---- PNG files ------------------------------------------------------------------------------------------------------


def _read_parquet(files: list[Path], part: str) -> Found:
    """Read Hugging Face's files: the PNGs in the column `img`, and `fine_label`."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{files[0]} needs pyarrow: pip install -r requirements-extra.txt, or pip install pyarrow"
                        ) from None

    def rows() -> Iterator[tuple[int, str, bytes]]:
        for path in files:
            with ParquetFile(path) as file:
                groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
                if sum(group.total_byte_size for group in groups) > MAX_UNPACKED:
                    raise UserError(f"{path} unpacks to more than {MAX_UNPACKED:,} bytes: {MOVE_AWAY}")
                for batch in file.iter_batches(1000, columns=["img", "fine_label"]):
                    pngs, labels = batch.column("img").field("bytes").to_pylist(), batch.column("fine_label")
                    yield from zip(labels.to_pylist(), itertools.repeat(str(path)), pngs, strict=False)

    try:
        return _decode(rows(), part, files[0])
    except (pa.ArrowException, OSError, LookupError, AttributeError, TypeError) as error:  # the latter: other columns
        raise UserError(f"{files[0]} is damaged or is not CIFAR-100 ({error}): {MOVE_AWAY}") from error


def _decode(pngs: Iterable[tuple[str | int, str, bytes]], part: str, source: Path) -> Found:
    """Decode PNGs: pairs of the class, by name or number, the file's name, and its content."""
    count = NUM_IMAGES[part]
    pixels, labels = np.empty((count, 32, 32, 3), dtype=np.uint8), list[int]()
    for label, name, content in tqdm(pngs, total=count, desc=f"decoding {source.name}", unit=" images", leave=False,
                                     disable=None):
        if len(labels) == count:
            raise UserError(f"{source} has more than {count:,} {part} images: {MOVE_AWAY}")
        if isinstance(label, str) and label not in FINE_NAMES:
            raise UserError(f"{source} has a folder {label}, which is not a class of CIFAR-100: {MOVE_AWAY}")
        pixels[len(labels)] = _pixels(content, name)
        labels.append(FINE_NAMES.index(label) if isinstance(label, str) else int(label))
    if len(labels) != count:
        raise UserError(f"{source} has {len(labels):,} {part} images instead of {count:,}: {MOVE_AWAY}")
    return _with_superclasses(pixels, labels, source, MOVE_AWAY)


def _pixels(content: bytes, name: str) -> np.ndarray:
    """The pixels of a PNG, uint8 [32, 32, 3]. A larger image is refused before anything is decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size == (32, 32):
                return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise UserError(f"{name} cannot be read as an image: {str(error) or type(error).__name__}") from error
    raise UserError(f"{name} is not a PNG of 32 x 32 pixels")
