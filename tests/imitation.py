"""An imitation of CIFAR-100 in a tenth of its size: the loader takes its random images for the official ones.

Its fixtures need neither the real data nor a network.
"""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from common.errors import UserError
from dataset import download
from utils import Split, load_cifar100, load_test_set

# The superclass of each fine class, copied from the official files; utils.py derives it from names.
OFFICIAL_COARSE_OF_FINE = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13)
SIZES = {"train": 6000, "test": 1000}  # 60 and 10 images per class
LOADERS: dict[str, Callable[[Path], object]] = {"train": load_cifar100, "test": load_test_set}


@pytest.fixture(autouse=True)
def no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests from downloading anything by mistake."""
    monkeypatch.setattr(download, "SOURCES", (download.Source("nowhere", ("http://127.0.0.1:9/cifar100.tgz",)),))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("CIFAR100_URL", raising=False)


@pytest.fixture(scope="module")
def official_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder with random images as the binary version, which the loader takes for the official ones."""
    folder = tmp_path_factory.mktemp("official")
    (folder / "cifar-100-binary").mkdir()
    ranks = []
    with pytest.MonkeyPatch.context() as patch:
        for seed, (part, count) in enumerate(SIZES.items()):
            generator = np.random.default_rng(seed)
            records = generator.integers(0, 256, (count, 3074), dtype=np.uint8)
            records[:, 1] = generator.permutation(np.arange(count) % 100)
            records[:, 0] = np.array(OFFICIAL_COARSE_OF_FINE)[records[:, 1]]
            write_records(folder, part, records)
            patch.setitem(utils.NUM_IMAGES, part, count)
            patch.setitem(utils.CONTENT_DIGESTS, part, utils.content_digest(as_split(records)))
            ranks.append(np.argsort(utils._content_order(as_split(records))))
        np.save(folder / "order.npy", np.concatenate(ranks).astype(np.uint16))
        patch.setattr(utils, "OFFICIAL_ORDER", folder / "order.npy")
        yield folder


def md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


@pytest.fixture(scope="module")
def python_data_dir(official_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the same images as the python version, unpacked and as an archive, which torchvision accepts."""
    from torchvision.datasets import CIFAR100  # here, because importing torchvision takes a second

    folder = tmp_path_factory.mktemp("python")
    unpacked, packed = folder / "cifar-100-python", folder / "cifar-100-python.tar.gz"
    unpacked.mkdir()
    for part in SIZES:
        records = read_records(official_data_dir, part)
        entry = {"data": records[:, 2:], "fine_labels": records[:, 1].tolist(),
                 "coarse_labels": records[:, 0].tolist()}
        (unpacked / part).write_bytes(pickle.dumps(entry, protocol=4))
    names = {"fine_label_names": list(utils.FINE_NAMES), "coarse_label_names": list(utils.COARSE_NAMES)}
    (unpacked / "meta").write_bytes(pickle.dumps(names))
    with tarfile.open(packed, "w:gz", compresslevel=0) as archive:
        archive.add(unpacked, unpacked.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR100, "tgz_md5", md5(packed))
        patch.setattr(CIFAR100, "train_list", [["train", md5(unpacked / "train")]])
        patch.setattr(CIFAR100, "test_list", [["test", md5(unpacked / "test")]])
        patch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(unpacked / "meta")})
        yield folder


@pytest.fixture(scope="module")
def everything(official_data_dir: Path) -> Split:
    train, nothing = load_cifar100(official_data_dir, train_on_all=True)
    assert nothing is None
    return train


@pytest.fixture(scope="module")
def parts(official_data_dir: Path) -> tuple[Split, Split]:
    train, val = load_cifar100(official_data_dir)
    assert val is not None
    return train, val


def as_split(records: np.ndarray) -> Split:
    """The Split of records of the binary version, uint8 [N, 3074]."""
    coarse_labels, fine_labels = torch.from_numpy(records[:, :2].astype(np.int64).T.copy())
    return Split(torch.from_numpy(records[:, 2:].reshape(-1, 3, 32, 32)), fine_labels, coarse_labels)


def read_records(folder: Path, part: str) -> np.ndarray:
    return np.fromfile(folder / "cifar-100-binary" / f"{part}.bin", dtype=np.uint8).reshape(-1, 3074)


def write_records(folder: Path, part: str, records: np.ndarray) -> Path:
    path = folder / "cifar-100-binary" / f"{part}.bin"
    path.parent.mkdir(exist_ok=True)
    records.tofile(path)
    return path


def png(record: np.ndarray) -> bytes:
    """The image of a record of the binary version as a PNG."""
    file = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(record[2:].reshape(3, 32, 32).transpose(1, 2, 0)))
    image.save(file, "PNG", compress_level=0)
    return file.getvalue()


def write_pngs(folder: Path, official: Path, parts: Sequence[str] = ("train", "test")) -> None:
    """Write the images in `official` as fast.ai does, for example to `train/fish/shark/0.png`."""
    for part in parts:
        for index, record in enumerate(read_records(official, part)):
            path = folder / part / utils.COARSE_NAMES[record[0]] / utils.FINE_NAMES[record[1]] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(record))


def refusal(load: Callable[[Path], object], data_dir: Path) -> str:
    """The one-line message with which `load` refuses the files in `data_dir`."""
    with pytest.raises(UserError) as refused:
        load(data_dir)
    text = str(refused.value)
    assert text and "\n" not in text
    return text


def assert_same(a: Split, b: Split) -> None:
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.fine_labels, b.fine_labels) and torch.equal(a.coarse_labels, b.coarse_labels)
    assert (a.fine_names, a.coarse_names) == (b.fine_names, b.coarse_names)
