"""The data set and its batches: what is loaded, what is refused and how, what a batch holds, what augmentation does.

Needs neither the real data nor a network: the official files are imitated in full size (tests/conftest.py), and the
downloads come from this machine.
"""

import hashlib
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torchvision.datasets import CIFAR100

import utils
from data import synthetic
from tests.helpers import ROOT, error_line, run_names, run_script
from utils import (
    Augmentation,
    Split,
    UserError,
    augment,
    batches,
    jitter,
    load_cifar100,
    load_test_set,
    picture_hashes,
    to_float,
)

# The superclass of each fine class as the official files have it, which is not how utils.py says it.
OFFICIAL_COARSE_OF_FINE = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13)
EVERYTHING = Augmentation(flip=True, crop=4, cutout=8)
FILL = torch.tensor([250, 251, 252], dtype=torch.uint8)  # a colour that no picture below has


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test does by mistake, it downloads nothing from elsewhere."""
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """An empty data folder that is removed at once: what tests put there has up to 184 MB."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def everything(official_data_dir: Path) -> Split:
    return load_cifar100(official_data_dir, train_on_all=True)[0]


@pytest.fixture(scope="module")
def parts(official_data_dir: Path) -> tuple[Split, Split]:
    train, val = load_cifar100(official_data_dir)
    assert val is not None
    return train, val


def read_records(folder: Path, part: str) -> np.ndarray:
    return np.fromfile(folder / "cifar-100-binary" / f"{part}.bin", dtype=np.uint8).reshape(-1, 3074)


def write_records(folder: Path, part: str, records: np.ndarray) -> Path:
    path = folder / "cifar-100-binary" / f"{part}.bin"
    path.parent.mkdir(exist_ok=True)
    records.tofile(path)
    return path


def refusal(load: Callable[[Path], object], data_dir: Path) -> str:
    """What the user is told, in one line, when `load` refuses what is in `data_dir`."""
    with pytest.raises(UserError) as refused:
        load(data_dir)
    text = str(refused.value)
    assert text and "\n" not in text
    return text


def assert_same(a: Split, b: Split) -> None:
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.fine_labels, b.fine_labels) and torch.equal(a.coarse_labels, b.coarse_labels)
    assert (a.fine_names, a.coarse_names) == (b.fine_names, b.coarse_names)


# ---------------------------------------------------------------------------------------------------------------------
# The binary version and its splits
# ---------------------------------------------------------------------------------------------------------------------


def test_names_and_superclasses_are_the_official_ones():
    assert OFFICIAL_COARSE_OF_FINE == utils.COARSE_OF_FINE
    assert utils.FINE_NAMES[:3] + utils.FINE_NAMES[-2:] == ("apple", "aquarium_fish", "baby", "woman", "worm")
    assert utils.COARSE_NAMES[:2] + utils.COARSE_NAMES[-1:] == ("aquatic_mammals", "fish", "vehicles_2")


def test_binary_version_keeps_every_pixel_and_label(official_data_dir, everything):
    test = load_test_set(official_data_dir)
    for split, part, pictures in ((everything, "train", 50_000), (test, "test", 10_000)):
        records = read_records(official_data_dir, part)
        assert split.images.shape == (pictures, 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.fine_labels.dtype == split.coarse_labels.dtype == torch.int64
        assert np.array_equal(split.coarse_labels, records[:, 0])
        assert np.array_equal(split.fine_labels, records[:, 1])
        assert np.array_equal(split.images.flatten(1), records[:, 2:])
        for picture, channel, row, column in ((0, 0, 0, 1), (7, 2, 31, 0), (pictures - 1, 1, 5, 9)):
            place = 2 + 1024 * channel + 32 * row + column
            assert split.images[picture, channel, row, column] == records[picture, place]


def test_validation_takes_50_of_every_class_and_training_the_rest(everything, parts):
    train, val = parts
    assert (len(train), len(val)) == (45_000, 5_000)
    assert torch.bincount(train.fine_labels).tolist() == [450] * 100
    assert torch.bincount(val.fine_labels).tolist() == [50] * 100
    train_hashes, val_hashes = set(picture_hashes(train.images)), set(picture_hashes(val.images))
    assert not train_hashes & val_hashes
    assert train_hashes | val_hashes == set(picture_hashes(everything.images))


def test_validation_pictures_are_those_with_the_smallest_hashes_of_their_class(parts):
    train, val = parts
    for fine in (0, 42, 99):
        held_out, rest = (picture_hashes(split.images[split.fine_labels == fine]) for split in (val, train))
        assert held_out.max() < rest.min()


def test_train_on_all_gives_every_picture_and_no_validation(official_data_dir):
    train, val = load_cifar100(official_data_dir, train_on_all=True)
    assert len(train) == 50_000 and val is None


def test_validation_does_not_depend_on_the_order_of_the_file(official_data_dir, parts, data_dir):
    records = read_records(official_data_dir, "train")
    write_records(data_dir, "train", records[np.random.default_rng(3).permutation(len(records))])
    _, val = load_cifar100(data_dir)
    assert set(picture_hashes(val.images)) == set(picture_hashes(parts[1].images))


def test_picture_hashes_are_the_first_8_bytes_of_sha256(official_data_dir, everything):
    hashes = picture_hashes(everything.images[:5])
    records = read_records(official_data_dir, "train")[:5]
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [struct.unpack("<Q", hashlib.sha256(record[2:].tobytes()).digest()[:8])[0]
                               for record in records]


def test_picture_hashes_do_not_depend_on_memory_layout(everything):
    images = everything.images[:5]
    assert np.array_equal(picture_hashes(images.to(memory_format=torch.channels_last)), picture_hashes(images))


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_training_never_reads_the_test_file(official_data_dir, parts, data_dir, content):
    binary = data_dir / "cifar-100-binary"
    binary.mkdir()
    (binary / "train.bin").symlink_to(official_data_dir / "cifar-100-binary" / "train.bin")
    if content is not None:
        (binary / "test.bin").write_bytes(content)
    train, val = load_cifar100(data_dir)
    assert_same(train, parts[0])
    assert_same(val, parts[1])


# ---------------------------------------------------------------------------------------------------------------------
# Files that are refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3074 * 49_999, 3074 * 50_000 - 1, 3074 * 50_000 + 1])
def test_a_training_file_of_another_size_is_refused(data_dir, size):
    path = write_records(data_dir, "train", np.zeros(0, np.uint8))
    with open(path, "r+b") as file:
        file.truncate(size)  # sparse where it grows
    text = refusal(load_cifar100, data_dir)
    assert str(path) in text and f"{size:,} bytes" in text and "delete it" in text


@pytest.mark.parametrize("size", [0, 3074 * 9_999, 3074 * 50_000])
def test_a_test_file_of_another_size_is_refused(data_dir, size):
    path = write_records(data_dir, "test", np.zeros(0, np.uint8))
    with open(path, "r+b") as file:
        file.truncate(size)
    text = refusal(load_test_set, data_dir)
    assert str(path) in text and f"{size:,} bytes" in text and "delete it" in text


def set_fine_label(records: np.ndarray, value: int) -> None:
    records[7, 1] = value


def set_coarse_label(records: np.ndarray, value: int) -> None:
    records[7, 0] = value


def turn_an_apple_into_a_worm(records: np.ndarray, _: int) -> None:
    records[np.flatnonzero(records[:, 1] == 0)[0], :2] = OFFICIAL_COARSE_OF_FINE[99], 99


def put_apples_and_beavers_into_each_others_superclass(records: np.ndarray, _: int) -> None:
    apples, beavers = records[:, 1] == 0, records[:, 1] == 4
    records[apples, 0], records[beavers, 0] = OFFICIAL_COARSE_OF_FINE[4], OFFICIAL_COARSE_OF_FINE[0]


@pytest.mark.parametrize(("part", "damage", "value", "complaint"), [
    ("train", set_fine_label, 100, "fine label 100"),
    ("train", set_coarse_label, 20, "coarse label 20"),
    ("train", turn_an_apple_into_a_worm, 0, "instead of 500"),
    ("train", put_apples_and_beavers_into_each_others_superclass, 0, "superclass"),
    ("test", set_fine_label, 255, "fine label 255"),
    ("test", set_coarse_label, 255, "coarse label 255"),
    ("test", turn_an_apple_into_a_worm, 0, "instead of 100"),
    ("test", put_apples_and_beavers_into_each_others_superclass, 0, "superclass"),
])
def test_labels_that_cannot_be_official_are_refused(official_data_dir, data_dir, part, damage, value, complaint):
    records = read_records(official_data_dir, part)
    damage(records, value)
    path = write_records(data_dir, part, records)
    text = refusal(load_cifar100 if part == "train" else load_test_set, data_dir)
    assert str(path) in text and complaint in text and "delete it" in text


def flip_a_bit_of_a_picture(records: np.ndarray) -> None:
    records[123, 2 + 456] ^= 1


def swap_two_pictures_labels(records: np.ndarray) -> None:
    one, other = (int(np.flatnonzero(records[:, 1] == label)[0]) for label in (0, 99))
    records[[one, other], :2] = records[[other, one], :2]


def show_one_picture_twice(records: np.ndarray) -> None:
    one, other = np.flatnonzero(records[:, 1] == 7)[:2]
    records[one] = records[other]


@pytest.mark.parametrize("damage", [flip_a_bit_of_a_picture, swap_two_pictures_labels, show_one_picture_twice])
@pytest.mark.parametrize("part", ["train", "test"])
def test_pictures_and_labels_that_are_not_the_official_ones_are_refused(official_data_dir, data_dir, part, damage):
    records = read_records(official_data_dir, part)
    damage(records)
    path = write_records(data_dir, part, records)
    text = refusal(load_cifar100 if part == "train" else load_test_set, data_dir)
    assert str(path) in text and "not the official ones" in text and "delete it" in text


def test_a_damaged_data_set_starts_no_run(official_data_dir, data_dir, tmp_path, capsys):
    records = read_records(official_data_dir, "train")
    flip_a_bit_of_a_picture(records)
    path = write_records(data_dir, "train", records)
    assert run_script(tmp_path / "results", "--data-dir", str(data_dir)) == 2
    assert str(path) in error_line(capsys)
    assert run_names(tmp_path / "results") == []
    assert np.array_equal(read_records(data_dir, "train"), records)


def test_another_data_set_of_the_same_size_is_refused(official_data_dir, data_dir):
    generator = np.random.default_rng(5)
    records = read_records(official_data_dir, "test")
    records[:, 2:] = generator.integers(0, 256, (10_000, 3072), dtype=np.uint8)
    write_records(data_dir, "test", records)
    assert "not the official ones" in refusal(load_test_set, data_dir)


@pytest.mark.skipif("CIFAR100_DIR" not in os.environ, reason="needs the real data set in $CIFAR100_DIR")
def test_the_real_data_set_is_taken_for_the_official_one():
    load = "import utils; train, val = utils.load_cifar100(utils.default_data_dir()); " \
        "print(len(train), len(val), len(utils.load_test_set(utils.default_data_dir())))"
    done = subprocess.run([sys.executable, "-c", load], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "45000 5000 10000\n", done.stderr


@pytest.mark.parametrize("below", [".", "folder"])
def test_a_data_folder_that_is_a_file_is_refused(tmp_path, below):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    text = refusal(load_cifar100, file / below)
    assert str(file) in text and "--data-dir" in text
    assert file.read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# The python version and its download
# ---------------------------------------------------------------------------------------------------------------------


def md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


@pytest.fixture(scope="module")
def python_data_dir(official_data_dir: Path) -> Iterator[Path]:
    """A folder with the same pictures as the python version, unpacked and as the archive that is downloaded."""
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / "cifar-100-python"
        unpacked.mkdir()
        for part in ("train", "test"):
            records = read_records(official_data_dir, part)
            entry = {"data": records[:, 2:], "fine_labels": records[:, 1].tolist(),
                     "coarse_labels": records[:, 0].tolist()}
            (unpacked / part).write_bytes(pickle.dumps(entry, protocol=4))
        names = {"fine_label_names": list(utils.FINE_NAMES), "coarse_label_names": list(utils.COARSE_NAMES)}
        (unpacked / "meta").write_bytes(pickle.dumps(names))
        with tarfile.open(Path(folder) / "cifar-100-python.tar.gz", "w:gz", compresslevel=0) as archive:
            archive.add(unpacked, unpacked.name)
        yield Path(folder)


@pytest.fixture(scope="module")
def md5s(python_data_dir: Path) -> dict[str, str]:
    files = [python_data_dir / "cifar-100-python.tar.gz", *(python_data_dir / "cifar-100-python").iterdir()]
    return {path.name: md5(path) for path in files}


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, md5s: dict[str, str]) -> None:
    """Make torchvision take the files of `python_data_dir` for the official ones."""
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5s["cifar-100-python.tar.gz"])
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5s["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5s["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5s["meta"]})


def unpack_with(data_dir: Path, python_data_dir: Path, **replaced: bytes) -> Path:
    """Put the python version into `data_dir`, with the content of some files replaced; returns its folder."""
    folder = data_dir / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        if name in replaced:
            (folder / name).write_bytes(replaced[name])
        else:
            (folder / name).symlink_to(python_data_dir / "cifar-100-python" / name)
    return folder


@pytest.mark.usefixtures("trusted")
def test_python_version_is_the_same_data_set(python_data_dir, official_data_dir, parts):
    train, val = load_cifar100(python_data_dir)
    assert_same(train, parts[0])
    assert_same(val, parts[1])
    assert_same(load_test_set(python_data_dir), load_test_set(official_data_dir))


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_python_version_with_one_wrong_byte_is_refused(python_data_dir, data_dir, name):
    content = bytearray((python_data_dir / "cifar-100-python" / name).read_bytes())
    content[len(content) // 2] ^= 1
    folder = unpack_with(data_dir, python_data_dir, **{name: bytes(content)})
    text = refusal(load_cifar100, data_dir)
    assert str(folder) in text and "delete that folder" in text


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_nothing_is_unpickled_from_a_file_with_another_md5(python_data_dir, data_dir, name):
    trace = data_dir / "unpickled"
    bomb = b"cos\nmkdir\n(V%b\ntR." % str(trace).encode()  # a pickle that makes a folder when it is read
    pickle.loads(bomb)
    trace.rmdir()  # so it works
    unpack_with(data_dir, python_data_dir, **{name: bomb})
    refusal(load_cifar100, data_dir)
    refusal(load_test_set, data_dir)
    assert not trace.exists()


@contextmanager
def server(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a web server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http_server.server_port}"
        finally:
            http_server.shutdown()
            thread.join()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    with server(partial(SimpleHTTPRequestHandler, directory=folder)) as url:
        yield url


@contextmanager
def without_the_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as url:
        yield url


@contextmanager
def with_half_of_the_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as url:
        (Path(folder) / "cifar-100-python.tar.gz").write_bytes(b"\x1f\x8b half an archive")
        yield url


@contextmanager
def hanging_up_early() -> Iterator[str]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "169001437")
        request.end_headers()
        request.wfile.write(b"\x1f\x8b half an archive")

    with server(type("HangsUp", (BaseHTTPRequestHandler,), {"do_GET": answer})) as url:
        yield url


@contextmanager
def not_speaking_http() -> Iterator[str]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"220 mail.example ESMTP\r\n")

    with server(type("NotHTTP", (BaseHTTPRequestHandler,), {"do_GET": answer})) as url:
        yield url


@contextmanager
def refusing_connections() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextmanager
def never_answering() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def download_from(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR100, "url", f"{url}/cifar-100-python.tar.gz")


BROKEN = (without_the_file, with_half_of_the_file, hanging_up_early, not_speaking_http, refusing_connections,
          never_answering)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda function: function.__name__)
def test_a_failed_download_is_one_line_and_leaves_nothing(data_dir, monkeypatch, broken):
    monkeypatch.setattr(utils, "NETWORK_TIMEOUT", 0.3)
    with broken() as url:
        download_from(url, monkeypatch)
        for _ in range(2):  # the second run finds nothing that it takes for the data set
            text = refusal(load_cifar100, data_dir)
            assert "cannot download" in text and str(data_dir) in text
            assert "data/README.md" in text and "--synthetic" in text
            assert list(data_dir.iterdir()) == []
    assert socket.getdefaulttimeout() is None


@pytest.mark.usefixtures("trusted")
def test_a_download_leaves_the_data_set_alone_in_the_folder(python_data_dir, parts, data_dir, monkeypatch):
    with hanging_up_early() as url:
        download_from(url, monkeypatch)
        refusal(load_cifar100, data_dir / "new")
    with serving(python_data_dir) as url:
        download_from(url, monkeypatch)
        train, val = load_cifar100(data_dir / "new")
    assert_same(train, parts[0])
    assert_same(val, parts[1])
    assert [path.name for path in (data_dir / "new").iterdir()] == ["cifar-100-python"]
    assert sorted(path.name for path in (data_dir / "new" / "cifar-100-python").iterdir()) == ["meta", "test", "train"]


# ---------------------------------------------------------------------------------------------------------------------
# The synthetic set
# ---------------------------------------------------------------------------------------------------------------------


def synthetic_splits() -> tuple[Split, Split, Split]:
    train, val = load_cifar100("unused", use_synthetic=True)
    assert val is not None
    return train, val, load_test_set("unused", use_synthetic=True)


def test_synthetic_set_has_the_shape_of_the_real_one():
    for split, per_class in zip(synthetic_splits(), (50, 10, 20), strict=True):
        assert split.images.shape == (100 * per_class, 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.fine_labels.dtype == split.coarse_labels.dtype == torch.int64
        assert torch.bincount(split.fine_labels).tolist() == [per_class] * 100
        assert torch.bincount(split.coarse_labels).tolist() == [5 * per_class] * 20
        assert (len(split.fine_names), len(split.coarse_names)) == (100, 20)
        for fine, coarse in zip(split.fine_labels[:100].tolist(), split.coarse_labels[:100].tolist(), strict=True):
            assert split.fine_names[fine].endswith(split.coarse_names[coarse])


def test_synthetic_set_is_always_the_same():
    for again, split in zip(synthetic_splits(), synthetic_splits(), strict=True):
        assert_same(again, split)


def test_synthetic_set_changes_with_its_seed():
    assert not torch.equal(synthetic.make_synthetic("val", seed=0)[0], synthetic.make_synthetic("val", seed=1)[0])


def test_synthetic_splits_share_no_picture():
    hashes = np.concatenate([picture_hashes(split.images) for split in synthetic_splits()])
    assert len(set(hashes)) == len(hashes)


def test_synthetic_and_official_names_never_mix(official_data_dir, everything):
    train, val = load_cifar100(official_data_dir, use_synthetic=True)
    for split in (train, val, load_test_set(official_data_dir, use_synthetic=True)):
        assert not set(split.fine_names) & set(everything.fine_names)
        assert not set(split.coarse_names) & set(everything.coarse_names)
        assert len(split) < 10_000


def test_synthetic_train_on_all_joins_train_and_validation():
    train, val, _ = synthetic_splits()
    joined, nothing = load_cifar100("unused", train_on_all=True, use_synthetic=True)
    assert nothing is None
    assert sorted(picture_hashes(joined.images)) == sorted([*picture_hashes(train.images), *picture_hashes(val.images)])


def test_synthetic_set_touches_no_folder(tmp_path):
    load_cifar100(tmp_path / "new", use_synthetic=True)
    load_test_set(tmp_path / "new", use_synthetic=True)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def small_split(pictures: int = 103) -> Split:
    """Random pictures without FILL's values, each with its own position as fine label."""
    images = torch.randint(0, 250, (pictures, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    return Split(images, torch.arange(pictures), torch.arange(pictures) // 5)


def epoch_of(split: Split, batch_size: int = 10, augmentation: Augmentation = EVERYTHING, *, seed: int = 0,
             epoch: int = 0, first_step: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(batches(split, batch_size, augmentation, seed=seed, epoch=epoch, first_step=first_step))


def labels_of(steps: list[tuple[Tensor, Tensor]]) -> list[int]:
    return torch.cat([labels for _, labels in steps]).tolist()


def assert_same_steps(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> None:
    assert len(a) == len(b)
    for (a_images, a_labels), (b_images, b_labels) in zip(a, b, strict=True):
        assert torch.equal(a_images, b_images) and torch.equal(a_labels, b_labels)


def test_an_epoch_shows_every_picture_once_with_its_label():
    split = small_split()
    steps = epoch_of(split, augmentation=Augmentation())
    assert sorted(labels_of(steps)) == list(range(len(split)))
    for images, labels in steps:
        assert torch.equal((images * 255).round().to(torch.uint8), split.images[labels])


@pytest.mark.parametrize("first_step", [0, 1, 5, 10, 11])
def test_an_epoch_can_be_resumed_at_any_step(first_step):
    whole = epoch_of(small_split())
    torch.manual_seed(99)
    assert_same_steps(epoch_of(small_split(), first_step=first_step), whole[first_step:])


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}])
def test_epochs_and_seeds_differ_in_order(other):
    split = small_split()
    assert labels_of(epoch_of(split)) != labels_of(epoch_of(split, **other))


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}])
def test_epochs_and_seeds_differ_in_augmentation(other):
    split = Split(*(tensor.expand(64, *tensor.shape[1:]) for tensor in (
        small_split(1).images, small_split(1).fine_labels, small_split(1).coarse_labels)))  # order changes nothing
    assert not torch.equal(epoch_of(split, 64)[0][0], epoch_of(split, 64, **other)[0][0])


@pytest.mark.parametrize(("pictures", "batch_size"), [(103, 10), (100, 10), (101, 100), (7, 500), (11, 10), (5, 1)])
def test_batches_are_of_nearly_one_size_and_never_larger(pictures, batch_size):
    sizes = [len(labels) for _, labels in epoch_of(small_split(pictures), batch_size)]
    assert sum(sizes) == pictures
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size
    assert len(sizes) == utils.steps_per_epoch(pictures, batch_size)


def test_batches_are_floats_between_0_and_1():
    split = small_split()
    split.images[:, :, :16], split.images[:, :, 16:] = 0, 255
    for images, labels in epoch_of(split, augmentation=Augmentation(flip=True)):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert (images.min(), images.max()) == (0, 1)


def test_augmentation_leaves_labels_and_the_split_as_they_are():
    split = small_split()
    assert labels_of(epoch_of(split)) == labels_of(epoch_of(split, augmentation=Augmentation()))
    assert_same(split, small_split())


def test_batches_cut_out_in_the_mean_colour():
    split = small_split()
    split.images[:] = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1)
    for images, _ in epoch_of(split, augmentation=Augmentation(cutout=16)):
        assert torch.equal((images * 255).round().to(torch.uint8), split.images[:len(images)])


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------------------------------


def augmented(images: Tensor, seed: int = 0, **options: int) -> Tensor:
    return augment(images, Augmentation(**options), torch.Generator().manual_seed(seed), FILL)


def shift_of(picture: Tensor, cropped: Tensor, crop: int) -> tuple[int, int]:
    """How far down and right the window of the reflected picture lies that `cropped` is; fails if it is none."""
    padded = np.pad(picture.numpy(), ((0, 0), (crop, crop), (crop, crop)), mode="reflect")
    windows = sliding_window_view(padded, (32, 32), axis=(1, 2))
    matches = np.argwhere((windows == cropped.numpy()[:, None, None]).all((0, 3, 4)))
    assert len(matches)
    return tuple((matches[0] - crop).tolist())


def test_augmentation_that_is_off_changes_nothing():
    images = small_split().images
    assert torch.equal(augmented(images), images)


@pytest.mark.parametrize("crop", [2, 4, 31])
def test_crops_are_windows_of_the_reflected_picture(crop):
    images = small_split(30).images
    shifts = [shift_of(*pair, crop) for pair in zip(images, augmented(images, crop=crop), strict=True)]
    for axis in (0, 1):
        assert min(shift[axis] for shift in shifts) < 0 < max(shift[axis] for shift in shifts)


def test_crops_reach_every_shift():
    images = small_split().images
    shifts = {shift_of(*pair, 1) for pair in zip(images, augmented(images, crop=1), strict=True)}
    assert shifts == {(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)}


def test_flip_gives_the_picture_or_its_mirror_image():
    images = small_split().images
    out = augmented(images, flip=True)
    same, mirrored = (out == images).flatten(1).all(1), (out == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 0.3 < mirrored.float().mean() < 0.7


def test_alternating_flips_show_every_picture_both_ways_in_two_epochs():
    split = small_split()
    flipped = []
    for epoch in range(4):
        steps = epoch_of(split, augmentation=Augmentation(flip=True, alternate=True), epoch=epoch)
        batch = torch.cat([images for images, _ in steps])
        seen = {tuple(row) for row in (batch * 255).round().to(torch.uint8).flatten(1).tolist()}
        flipped.append([tuple(row) in seen for row in split.images.flip(-1).flatten(1).tolist()])
    assert flipped[0] == flipped[2] and flipped[1] == flipped[3]
    assert [not way for way in flipped[0]] == flipped[1]
    assert 0.3 < np.mean(flipped[0]) < 0.7


def test_jitter_changes_brightness_and_contrast_within_its_strength_and_nothing_else():
    images = to_float(small_split().images)
    out = jitter(images, 0.2, torch.Generator().manual_seed(0))
    contrast = out.flatten(1).std(1) / images.flatten(1).std(1)
    brightness = (out - 0.5 - contrast.view(-1, 1, 1, 1) * (images - 0.5)).flatten(1)
    torch.testing.assert_close(brightness.std(1), torch.zeros(len(images)), atol=1e-4, rtol=0)
    for change in (contrast - 1, brightness.mean(1)):
        assert -0.2001 < change.min() < -0.1 and 0.1 < change.max() < 0.2001
    assert torch.equal(jitter(images, 0.0, torch.Generator()), images)


@pytest.mark.parametrize("side", [1, 2, 7, 8, 15, 16])
def test_cutout_blanks_a_square_of_its_side(side):
    images, whole = small_split().images, 0
    for picture, out in zip(images, augmented(images, cutout=side), strict=True):
        blank = (out == FILL.view(3, 1, 1)).all(0)
        assert torch.equal(out[:, ~blank], picture[:, ~blank])
        rows, columns = blank.any(1), blank.any(0)
        assert torch.equal(blank, rows[:, None] & columns)
        for hit in (rows, columns):
            places = hit.nonzero().flatten().tolist()
            assert places and places == list(range(places[0], places[-1] + 1))
            assert len(places) == side or (len(places) < side and (hit[0] or hit[-1]))  # cut off at an edge
        whole += blank.sum().item() == side**2
    assert whole > 0


def test_augmentation_depends_on_the_generators_seed_alone():
    images, state = small_split().images, torch.get_rng_state()
    once = augmented(images, seed=5, flip=True, crop=4, cutout=8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augmented(images, seed=5, flip=True, crop=4, cutout=8), once)
    assert not torch.equal(augmented(images, seed=6, flip=True, crop=4, cutout=8), once)
    assert torch.equal(images, small_split().images)
