"""The dataset and its batches: what the loader returns and refuses, and what a batch and its augmentation contain.

These tests need neither the real data nor a network: tests/imitation.py stands in for the official files.
"""

import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from torch import Tensor

import utils
from common.command_line import exit_status
from dataset import formats, synthetic
from tests.helpers import ROOT, drawn_once, error_line, run_names, run_script  # noqa: F401 (a fixture)
from tests.imitation import (
    LOADERS,
    OFFICIAL_COARSE_OF_FINE,
    SIZES,
    assert_same,
    png,
    read_records,
    refusal,
    write_pngs,
    write_records,
)
from utils import (
    Augmentation,
    Split,
    augment,
    batches,
    corrupt,
    image_hashes,
    jitter,
    load_cifar100,
    load_test_set,
    to_float,
)

OFFICIAL_SIZES = dict(utils.NUM_IMAGES)
EVERYTHING = Augmentation(flip=True, crop=4)


# ---- The binary version and its splits ------------------------------------------------------------------------------


def test_sizes_names_and_superclasses_are_official():
    assert OFFICIAL_SIZES == {"train": 50_000, "test": 10_000}
    assert OFFICIAL_COARSE_OF_FINE == utils.COARSE_OF_FINE
    assert utils.FINE_NAMES[:3] + utils.FINE_NAMES[-2:] == ("apple", "aquarium_fish", "baby", "woman", "worm")
    assert utils.COARSE_NAMES[:2] + utils.COARSE_NAMES[-1:] == ("aquatic_mammals", "fish", "vehicles_2")


def test_binary_version_keeps_every_pixel_and_label(official_data_dir, everything):
    test = load_test_set(official_data_dir)
    for split, part in ((everything, "train"), (test, "test")):
        records, count = read_records(official_data_dir, part), SIZES[part]
        assert split.images.shape == (count, 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.fine_labels.dtype == split.coarse_labels.dtype == torch.int64
        assert np.array_equal(split.coarse_labels, records[:, 0])
        assert np.array_equal(split.fine_labels, records[:, 1])
        assert np.array_equal(split.images.flatten(1), records[:, 2:])
        for image, channel, row, column in ((0, 0, 0, 1), (7, 2, 31, 0), (count - 1, 1, 5, 9)):
            place = 2 + 1024 * channel + 32 * row + column
            assert split.images[image, channel, row, column] == records[image, place]


def test_validation_takes_50_images_of_each_class(everything, parts):
    train, val = parts
    assert torch.bincount(train.fine_labels).tolist() == [10] * 100
    assert torch.bincount(val.fine_labels).tolist() == [50] * 100
    train_hashes, val_hashes = set(image_hashes(train.images)), set(image_hashes(val.images))
    assert not train_hashes & val_hashes
    assert train_hashes | val_hashes == set(image_hashes(everything.images))


def test_validation_images_have_the_smallest_hashes(parts):
    train, val = parts
    for fine in (0, 42, 99):
        held_out, rest = (image_hashes(split.images[split.fine_labels == fine]) for split in (val, train))
        assert held_out.max() < rest.min()


def test_neither_images_nor_splits_depend_on_the_order_of_the_file(official_data_dir, everything, parts, tmp_path):
    records = read_records(official_data_dir, "train")
    write_records(tmp_path, "train", records[np.random.default_rng(3).permutation(len(records))])
    assert_same(load_cifar100(tmp_path, train_on_all=True)[0], everything)
    assert_same(load_cifar100(tmp_path)[1], parts[1])


def test_the_official_order_has_a_place_for_every_image():
    places = np.load(ROOT / "dataset" / "official-order.npy")
    for order in np.split(places, [50_000]):
        assert np.array_equal(np.sort(order), np.arange(len(order)))


def test_image_hashes_are_the_first_8_bytes_of_sha256(official_data_dir, everything):
    images, records = everything.images[:5], read_records(official_data_dir, "train")[:5]
    hashes = image_hashes(images)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [struct.unpack("<Q", hashlib.sha256(record[2:].tobytes()).digest()[:8])[0]
                               for record in records]
    assert np.array_equal(image_hashes(images.to(memory_format=torch.channels_last)), hashes)


@pytest.mark.parametrize("content", [None, b"garbage"])
def test_training_never_reads_the_test_file(official_data_dir, parts, tmp_path, content):
    binary = tmp_path / "cifar-100-binary"
    binary.mkdir()
    (binary / "train.bin").symlink_to(official_data_dir / "cifar-100-binary" / "train.bin")
    if content is not None:
        (binary / "test.bin").write_bytes(content)
    train, val = load_cifar100(tmp_path)
    assert_same(train, parts[0])
    assert_same(val, parts[1])


# ---- Files that are refused -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("official_data_dir")
@pytest.mark.parametrize("part", LOADERS)
def test_a_file_of_another_size_is_refused(tmp_path, part):
    right = 3074 * SIZES[part]
    path = write_records(tmp_path, part, np.zeros(0, np.uint8))
    for size in (0, 1, right - 3074, right - 1, right + 1, 3074 * 50_000):
        with open(path, "r+b") as file:
            file.truncate(size)  # sparse where it grows
        text = refusal(LOADERS[part], tmp_path)
        assert str(path) in text and f"{size:,} bytes" in text and "unpack" in text


def set_fine_label(records: np.ndarray) -> None:
    records[7, 1] = 100


def set_coarse_label(records: np.ndarray) -> None:
    records[7, 0] = 20


def relabel_an_apple_as_a_worm(records: np.ndarray) -> None:
    records[np.flatnonzero(records[:, 1] == 0)[0], :2] = OFFICIAL_COARSE_OF_FINE[99], 99


def swap_the_superclasses_of_apples_and_beavers(records: np.ndarray) -> None:
    apples, beavers = records[:, 1] == 0, records[:, 1] == 4
    records[apples, 0], records[beavers, 0] = OFFICIAL_COARSE_OF_FINE[4], OFFICIAL_COARSE_OF_FINE[0]


def flip_a_bit_of_an_image(records: np.ndarray) -> None:
    records[123, 2 + 456] ^= 1


def swap_the_labels_of_two_images(records: np.ndarray) -> None:
    one, other = (int(np.flatnonzero(records[:, 1] == label)[0]) for label in (0, 99))
    records[[one, other], :2] = records[[other, one], :2]


def repeat_an_image(records: np.ndarray) -> None:
    one, other = np.flatnonzero(records[:, 1] == 7)[:2]
    records[one] = records[other]


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize(("damage", "complaint"), [
    (set_fine_label, "fine label 100"),
    (set_coarse_label, "coarse label 20"),
    (relabel_an_apple_as_a_worm, "instead of"),
    (swap_the_superclasses_of_apples_and_beavers, "superclass"),
    (flip_a_bit_of_an_image, "not the official ones"),
    (swap_the_labels_of_two_images, "not the official ones"),
    (repeat_an_image, "not the official ones"),
])
def test_images_or_labels_that_are_not_official_are_refused(official_data_dir, tmp_path, part, damage, complaint):
    records = read_records(official_data_dir, part)
    damage(records)
    path = write_records(tmp_path, part, records)
    text = refusal(LOADERS[part], tmp_path)
    assert str(path) in text and complaint in text and "unpack" in text


def test_a_damaged_dataset_starts_no_run(official_data_dir, tmp_path, capsys):
    records = read_records(official_data_dir, "train")
    flip_a_bit_of_an_image(records)
    path = write_records(tmp_path, "train", records)
    assert run_script(tmp_path / "results", "--data-dir", str(tmp_path)) == 2
    assert str(path) in error_line(capsys)
    assert run_names(tmp_path / "results") == []
    assert np.array_equal(read_records(tmp_path, "train"), records)


@pytest.mark.skipif("CIFAR100_DIR" not in os.environ, reason="needs the real dataset in $CIFAR100_DIR")
def test_the_real_dataset_is_accepted():
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


def test_the_loader_is_also_a_command(official_data_dir, tmp_path, capsys):
    assert exit_status(lambda: utils.main(["--data-dir", str(official_data_dir)])) == 0
    assert "6,000 training images" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert exit_status(lambda: utils.main(["--data-dir", str(tmp_path / "file")])) == 2
    error_line(capsys)


# ---- The python version ----------------------------------------------------------------------------


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


def test_python_version_is_the_same_dataset(python_data_dir, official_data_dir, parts):
    train, val = load_cifar100(python_data_dir)
    assert_same(train, parts[0])
    assert_same(val, parts[1])
    assert_same(load_test_set(python_data_dir), load_test_set(official_data_dir))


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_python_version_with_one_wrong_byte_is_refused(python_data_dir, tmp_path, name):
    content = bytearray((python_data_dir / "cifar-100-python" / name).read_bytes())
    content[len(content) // 2] ^= 1
    folder = unpack_with(tmp_path, python_data_dir, **{name: bytes(content)})
    text = refusal(load_cifar100, tmp_path)
    assert str(folder) in text and "delete that folder" in text


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_file_with_another_md5_is_not_unpickled(python_data_dir, tmp_path, name):
    trace = tmp_path / "unpickled"
    bomb = b"cos\nmkdir\n(V%b\ntR." % str(trace).encode()  # a pickle that creates a folder when it is loaded
    pickle.loads(bomb)
    trace.rmdir()  # so it works
    unpack_with(tmp_path, python_data_dir, **{name: bomb})
    for load in LOADERS.values():
        refusal(load, tmp_path)
    assert not trace.exists()


# ---- Forms that people have -----------------------------------------------------------------------------------------


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz", compresslevel=0) as packed:
        packed.add(folder, folder.name)


@dataclass(frozen=True)
class Originals:
    """Folders with the imitation in the binary version, in the python version, and as PNGs."""

    binary: Path
    python: Path
    pngs: Path


def binary_archive(data_dir: Path, originals: Originals) -> None:
    pack(originals.binary / "cifar-100-binary", data_dir / "cifar-100-binary.tar.gz")


def python_archive(data_dir: Path, originals: Originals) -> None:
    (data_dir / "cifar-100-python.tar.gz").symlink_to(originals.python / "cifar-100-python.tar.gz")


def python_files_of_kaggle(data_dir: Path, originals: Originals) -> None:
    for name in ("train", "test", "meta"):
        (data_dir / name).symlink_to(originals.python / "cifar-100-python" / name)


def pngs_by_class(data_dir: Path, originals: Originals) -> None:
    for path in originals.pngs.glob("*/*/*"):
        link = data_dir / path.parent.parent.name / path.name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path)


def pngs_by_superclass_and_class(data_dir: Path, originals: Originals) -> None:
    (data_dir / "cifar100").symlink_to(originals.pngs)


def archive_of_test_pngs(data_dir: Path, originals: Originals) -> None:
    pack(originals.pngs / "test", data_dir / "cifar100.tgz")


def parquet(data_dir: Path, originals: Originals, parts: Sequence[str] = ("train", "test")) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part in parts:
        records = read_records(originals.binary, part)[::-1]
        images = [{"bytes": png(record), "path": f"{index}.png"} for index, record in enumerate(records)]
        table = pa.table({"img": images, "fine_label": records[:, 1], "coarse_label": records[:, 0]})
        pq.write_table(table, data_dir / f"{part}-00000-of-00001.parquet")


def parquet_of_test_in_a_folder(data_dir: Path, originals: Originals) -> None:
    (data_dir / "cifar100").mkdir()
    parquet(data_dir / "cifar100", originals, ["test"])


FORMS = (binary_archive, python_archive, python_files_of_kaggle, pngs_by_class, pngs_by_superclass_and_class,
         parquet, archive_of_test_pngs, parquet_of_test_in_a_folder)


@pytest.fixture(scope="module")
def originals(official_data_dir: Path, python_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Originals:
    pngs = tmp_path_factory.mktemp("pngs") / "any name"
    write_pngs(pngs, official_data_dir)
    return Originals(official_data_dir, python_data_dir, pngs)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_tensors(form, originals, official_data_dir, everything, tmp_path):
    form(tmp_path, originals)
    before = sorted(tmp_path.rglob("*"))
    if "of_test" not in form.__name__:  # the others are smaller, to be quick
        assert_same(load_cifar100(tmp_path, train_on_all=True)[0], everything)
    assert_same(load_test_set(tmp_path), load_test_set(official_data_dir))
    assert sorted(tmp_path.rglob("*")) == before  # read where it lies


def test_parquet_files_without_pyarrow_name_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "train-00000-of-00001.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refusal(load_cifar100, tmp_path)


def test_a_parquet_file_of_something_else_is_refused(official_data_dir, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "test-00000-of-00001.parquet"
    labels = [0] * SIZES["test"]
    for columns in ({"x": [1]}, {"img": [1], "fine_label": [1]}, {"img": [{"bytes": None}], "fine_label": [1]},
                    {"img": [{"bytes": b"no PNG"}] * SIZES["test"], "fine_label": labels}):
        pq.write_table(pa.table(columns), path)
        refusal(load_test_set, tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    assert str(path) in refusal(load_test_set, tmp_path)


def test_an_odd_folder_of_pngs_is_refused(official_data_dir, tmp_path):
    write_pngs(tmp_path, official_data_dir, ("test",))
    apple = next((tmp_path / "test").glob("*/apple/*"))
    content = apple.read_bytes()
    for damaged, complaint in ((b"", "cannot be read"), (content[:-50], "cannot be read"),
                               (png(np.zeros(3074, np.uint8)), "not the official ones"), (big_png(), "32 x 32")):
        apple.write_bytes(damaged)
        assert complaint in refusal(load_test_set, tmp_path)
    apple.unlink()
    assert "999 test images instead of 1,000" in refusal(load_test_set, tmp_path)
    apple.write_bytes(content)
    (apple.parent / "one more.png").write_bytes(content)
    assert "more than 1,000" in refusal(load_test_set, tmp_path)
    apple.parent.rename(apple.parent.with_name("cat"))
    assert "not a class of CIFAR-100" in refusal(load_test_set, tmp_path)


def big_png() -> bytes:
    """A PNG of 64 million pixels in 60 kB."""
    file = io.BytesIO()
    Image.new("1", (8000, 8000)).save(file, "PNG")
    return file.getvalue()


def tgz(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_pickle_in_an_archive_is_not_executed(python_data_dir, tmp_path):
    trace = tmp_path / "unpickled"
    bomb = b"cos\nmkdir\n(V%b\ntR." % str(trace).encode()
    path = tgz(tmp_path / "cifar-100-python.tar.gz", *((f"cifar-100-python/{name}", bomb)
                                                       for name in ("train", "meta", "test")))
    for load in LOADERS.values():
        assert str(path) in refusal(load, tmp_path)
    assert not trace.exists()


def test_an_archive_writes_nothing_outside(official_data_dir, tmp_path):
    data_dir = tmp_path / "one" / "data"
    data_dir.mkdir(parents=True)
    names = ("../meta", "../../train", str(tmp_path / "test"), "../train/apple/x.png")
    for first in range(len(names)):
        tgz(data_dir / "cifar-100-python.tar.gz", *((name, b"x") for name in names[first:] + names[:first]))
        refusal(load_cifar100, data_dir)
    assert [path.name for path in tmp_path.rglob("*")] == ["one", "data", "cifar-100-python.tar.gz"]


def test_an_archive_that_is_damaged_or_a_bomb_is_refused(official_data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_UNPACKED", 30_000_000)
    path = tmp_path / "cifar-100-binary.tar.gz"
    pack(official_data_dir / "cifar-100-binary", path)
    good = path.read_bytes()
    load_cifar100(tmp_path)
    sparse = tarfile.TarInfo("test")
    sparse.size, sparse.type = 0, tarfile.GNUTYPE_SPARSE
    header = bytearray(sparse.tobuf())
    header[483:495] = tarfile.itn(2**40, 12, tarfile.GNU_FORMAT)  # the size that it claims to unpack to
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    long_name = tarfile.TarInfo("x")
    long_name.size, long_name.type = 2**31, tarfile.GNUTYPE_LONGNAME
    for content in (b"", b"no archive", good[: 2**20],
                    gzip.compress(bytes(2**25)), gzip.compress(bytes(header) + bytes(1024)),
                    gzip.compress(long_name.tobuf() + bytes(2**25))):
        path.write_bytes(content)
        text = refusal(load_test_set, tmp_path)
        assert str(path) in text and "move it away" in text


# ---- Folders close to the right one ---------------------------------------------------------------------------------


def inner(folder: Path, unpacked: Path) -> Path:
    (folder / unpacked.name).symlink_to(unpacked)
    return folder / unpacked.name


def renamed(folder: Path, unpacked: Path) -> Path:
    (folder / "cifar100").symlink_to(unpacked)
    return folder / "cifar100"


def unpacked_twice(folder: Path, unpacked: Path) -> Path:
    (folder / unpacked.name).mkdir()
    inner(folder / unpacked.name, unpacked)
    return folder


@pytest.mark.parametrize("place", [inner, renamed, unpacked_twice])
@pytest.mark.parametrize("version", ["binary", "python"])
def test_a_folder_close_to_the_right_one_is_taken(
    version, place, official_data_dir, python_data_dir, parts, tmp_path
):
    source = {"binary": official_data_dir, "python": python_data_dir}[version]
    data_dir = place(tmp_path, source / f"cifar-100-{version}")
    assert_same(load_cifar100(data_dir)[0], parts[0])
    load_test_set(data_dir)


@pytest.mark.parametrize("below", ["cifar-100-binary", "."])
def test_a_missing_file_is_named_and_nothing_downloaded(below, official_data_dir, tmp_path):
    (tmp_path / below).mkdir(exist_ok=True)
    (tmp_path / below / "train.bin").symlink_to(official_data_dir / "cifar-100-binary" / "train.bin")
    load_cifar100(tmp_path)
    assert refusal(load_test_set, tmp_path) == f"{tmp_path / below} has no test.bin: {formats.UNPACK_AGAIN}"


@pytest.mark.parametrize("below", [".", "cifar100"])
@pytest.mark.parametrize(("part", "other"), [("train", "test"), ("test", "train")])
def test_a_missing_part_is_named_and_nothing_downloaded(part, other, below, tmp_path):
    place = tmp_path / below
    (place / other / "fish" / "shark").mkdir(parents=True)
    (place / part).mkdir()
    text = refusal(LOADERS[part], tmp_path)
    assert text == f"{place / other} has images by class, but {place / part} has none: {formats.ADD_THE_OTHER}"
    (place / f"{other}-00000-of-00001.parquet").touch()
    text = refusal(LOADERS[part], tmp_path)
    assert text == f"{place} has {other}-*.parquet, but no {part}-*.parquet: {formats.ADD_THE_OTHER}"


def test_missing_files_of_the_python_version_are_named(python_data_dir, tmp_path):
    folder = unpack_with(tmp_path, python_data_dir)
    (folder / "meta").unlink()
    (folder / "test").unlink()
    assert refusal(load_cifar100, tmp_path).startswith(f"{folder} has no meta and no test: ")
    (folder / "train").unlink()
    assert "no train" in refusal(load_cifar100, folder)  # empty


def test_a_mistyped_data_folder_is_not_created(official_data_dir, tmp_path, capsys):
    (tmp_path / "datasets").mkdir()
    text = refusal(load_cifar100, tmp_path / "dataset")
    question = f"is it {tmp_path / 'datasets'}?"
    assert text.startswith(f"the folder {tmp_path / 'dataset'} does not exist ({question}): create it")
    assert "is it" not in refusal(load_cifar100, tmp_path / "missing" / "x")
    assert run_script(tmp_path / "results", "--data-dir", str(tmp_path / "x"), "--quiet") == 2
    assert str(tmp_path / "x") in error_line(capsys)
    assert run_names(tmp_path) == ["datasets"]


def test_the_default_data_folder_is_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for value, folder in (("~/images", tmp_path / "images"), ("images", tmp_path / "images"), ("", ROOT / "data")):
        monkeypatch.setenv("CIFAR100_DIR", value)
        assert utils.default_data_dir() == str(folder)


# ---- The synthetic set ----------------------------------------------------------------------------------------------


def synthetic_splits() -> tuple[Split, Split, Split]:
    train, val = load_cifar100("unused", use_synthetic=True)
    assert val is not None
    return train, val, load_test_set("unused", use_synthetic=True)


@pytest.fixture(scope="module")
def drawn(drawn_once: None) -> tuple[Split, Split, Split]:  # noqa: F811
    train, val = load_cifar100("unused", use_synthetic=True)
    assert val is not None
    return train, val, load_test_set("unused", use_synthetic=True)


def test_synthetic_splits_have_shapes_like_the_real_ones(drawn):
    for split, per_class in zip(drawn, (50, 10, 20), strict=True):
        assert split.images.shape == (100 * per_class, 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.fine_labels.dtype == split.coarse_labels.dtype == torch.int64
        assert torch.bincount(split.fine_labels).tolist() == [per_class] * 100
        assert torch.bincount(split.coarse_labels).tolist() == [5 * per_class] * 20
        assert (len(split.fine_names), len(split.coarse_names)) == (100, 20)
        for fine, coarse in zip(split.fine_labels[:100].tolist(), split.coarse_labels[:100].tolist(), strict=True):
            assert split.fine_names[fine].endswith(split.coarse_names[coarse])


def test_synthetic_images_depend_only_on_split_and_seed(drawn):
    draw = synthetic.make_synthetic.__wrapped__  # without the cache of `drawn_once`
    for same, one in zip(draw("val"), (drawn[1].images, drawn[1].fine_labels), strict=True):
        assert torch.equal(same, one)
    assert not torch.equal(draw("val", seed=1)[0], drawn[1].images)


def test_synthetic_splits_share_no_image(drawn):
    hashes = np.concatenate([image_hashes(split.images) for split in drawn])
    assert len(set(hashes)) == len(hashes)


def test_synthetic_names_are_not_official_names(drawn):
    for split in drawn:
        assert not set(split.fine_names) & set(utils.FINE_NAMES)
        assert not set(split.coarse_names) & set(utils.COARSE_NAMES)


def test_synthetic_train_on_all_joins_train_and_validation(drawn):
    train, val, _ = drawn
    joined, nothing = load_cifar100("unused", train_on_all=True, use_synthetic=True)
    assert nothing is None
    assert sorted(image_hashes(joined.images)) == sorted([*image_hashes(train.images), *image_hashes(val.images)])


def test_synthetic_set_touches_no_folder(tmp_path):
    load_cifar100(tmp_path / "new", use_synthetic=True)
    load_test_set(tmp_path / "new", use_synthetic=True)
    assert not (tmp_path / "new").exists()


# ---- Batches --------------------------------------------------------------------------------------------------------


def small_split(count: int = 103) -> Split:
    """Random images, each with its own position as fine label."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    return Split(images, torch.arange(count), torch.arange(count) // 5)


def epoch_of(split: Split, batch_size: int = 10, augmentation: Augmentation = EVERYTHING, *, seed: int = 0,
             epoch: int = 0, first_step: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(batches(split, batch_size, augmentation, seed=seed, epoch=epoch, first_step=first_step))


def labels_of(steps: list[tuple[Tensor, Tensor]]) -> list[int]:
    return torch.cat([labels for _, labels in steps]).tolist()


def assert_same_steps(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> None:
    assert len(a) == len(b)
    for (a_images, a_labels), (b_images, b_labels) in zip(a, b, strict=True):
        assert torch.equal(a_images, b_images) and torch.equal(a_labels, b_labels)


def test_an_epoch_shows_every_image_once_with_its_label():
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
def test_epochs_and_seeds_differ_in_order_and_augmentation(other):
    split = small_split()
    assert labels_of(epoch_of(split)) != labels_of(epoch_of(split, **other))
    one = small_split(1)
    copies = Split(*(tensor.expand(64, *tensor.shape[1:])  # so that the order changes nothing
                     for tensor in (one.images, one.fine_labels, one.coarse_labels)))
    assert not torch.equal(epoch_of(copies, 64)[0][0], epoch_of(copies, 64, **other)[0][0])


@pytest.mark.parametrize(("count", "batch_size"), [(103, 10), (100, 10), (101, 100), (7, 500), (11, 10), (5, 1)])
def test_batches_are_of_nearly_equal_size(count, batch_size):
    sizes = [len(labels) for _, labels in epoch_of(small_split(count), batch_size)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size
    assert len(sizes) == utils.steps_per_epoch(count, batch_size)


def test_batches_are_floats_between_0_and_1():
    split = small_split()
    split.images[:, :, :16], split.images[:, :, 16:] = 0, 255
    for images, labels in epoch_of(split, augmentation=Augmentation(flip=True)):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert (images.min(), images.max()) == (0, 1)


def test_augmentation_leaves_labels_and_the_split_unchanged():
    split = small_split()
    assert labels_of(epoch_of(split)) == labels_of(epoch_of(split, augmentation=Augmentation()))
    assert_same(split, small_split())


# ---- Augmentation ---------------------------------------------------------------------------------------------------


def augmented(images: Tensor, seed: int = 0, **options: int) -> Tensor:
    return augment(images, Augmentation(**options), torch.Generator().manual_seed(seed))


def shift_of(image: Tensor, cropped: Tensor, crop: int) -> tuple[int, int]:
    """How far down and right `cropped` was cut out of the reflected image; fails if it was not."""
    padded = np.pad(image.numpy(), ((0, 0), (crop, crop), (crop, crop)), mode="reflect")
    windows = sliding_window_view(padded, (32, 32), axis=(1, 2))
    matches = np.argwhere((windows == cropped.numpy()[:, None, None]).all((0, 3, 4)))
    assert len(matches)
    return tuple((matches[0] - crop).tolist())


def test_augmentation_that_is_off_changes_nothing():
    images = small_split().images
    assert torch.equal(augmented(images), images)


@pytest.mark.parametrize("crop", [2, 4, 31])
def test_crops_are_windows_of_the_reflected_image(crop):
    images = small_split(30 if crop < 31 else 10).images
    shifts = [shift_of(*pair, crop) for pair in zip(images, augmented(images, crop=crop), strict=True)]
    for axis in (0, 1):
        assert min(shift[axis] for shift in shifts) < 0 < max(shift[axis] for shift in shifts)


def test_crops_reach_every_shift():
    images = small_split().images
    shifts = {shift_of(*pair, 1) for pair in zip(images, augmented(images, crop=1), strict=True)}
    assert shifts == {(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)}


def test_flip_gives_the_image_or_its_mirror_image():
    images = small_split().images
    out = augmented(images, flip=True)
    same, mirrored = (out == images).flatten(1).all(1), (out == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 0.3 < mirrored.float().mean() < 0.7


def test_alternating_flips_show_both_sides_in_two_epochs():
    split = small_split(50)
    flipped = []
    for epoch in range(4):
        steps = epoch_of(split, augmentation=Augmentation(flip=True, alternate=True), epoch=epoch)
        batch = torch.cat([images for images, _ in steps])
        seen = {tuple(row) for row in (batch * 255).round().to(torch.uint8).flatten(1).tolist()}
        flipped.append([tuple(row) in seen for row in split.images.flip(-1).flatten(1).tolist()])
    assert flipped[0] == flipped[2] and flipped[1] == flipped[3]
    assert [not way for way in flipped[0]] == flipped[1]
    assert 0.3 < np.mean(flipped[0]) < 0.7


def test_jitter_changes_only_brightness_and_contrast():
    images = to_float(small_split().images)
    out = jitter(images, 0.2, torch.Generator().manual_seed(0))
    contrast = out.flatten(1).std(1) / images.flatten(1).std(1)
    brightness = (out - 0.5 - contrast.view(-1, 1, 1, 1) * (images - 0.5)).flatten(1)
    torch.testing.assert_close(brightness.std(1), torch.zeros(len(images)), atol=1e-4, rtol=0)
    for change in (contrast - 1, brightness.mean(1)):
        assert -0.2001 < change.min() < -0.1 and 0.1 < change.max() < 0.2001
    assert torch.equal(jitter(images, 0.0, torch.Generator()), images)


def test_a_share_of_a_batch_is_corrupted():
    images = to_float(small_split().images)[:30]
    out = corrupt(images, 0.3, torch.Generator().manual_seed(0))
    noisy, coarse, blurred = out[:3], out[3:6], out[6:9]
    assert torch.equal(out[9:], images[9:]) and torch.equal(corrupt(images, 0.0, torch.Generator()), images)
    for changed, original in zip(out[:9], images[:9], strict=True):
        assert not torch.equal(changed, original)
    assert (noisy - images[:3]).std() < 0.1 and noisy.min() >= 0 and noisy.max() <= 1
    assert torch.equal(coarse[..., ::2, ::2], coarse[..., 1::2, 1::2])
    torch.testing.assert_close(coarse.mean((2, 3)), images[3:6].mean((2, 3)))
    assert (blurred.diff(dim=3).abs().mean((1, 2, 3)) < images[6:9].diff(dim=3).abs().mean((1, 2, 3))).all()


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3, 50, 52])
def test_any_share_of_any_batch_can_be_corrupted(count: int, share: float):
    images = torch.rand(count, 3, 32, 32)
    out = corrupt(images, share, torch.Generator().manual_seed(0))
    changed = (out != images).flatten(1).any(1).sum().item()
    assert out.shape == images.shape and changed == 3 * min(round(share * count / 3), count // 3)


def test_augmentation_depends_only_on_the_generators_seed():
    images, state = small_split().images, torch.get_rng_state()
    once = augmented(images, seed=5, flip=True, crop=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augmented(images, seed=5, flip=True, crop=4), once)
    assert not torch.equal(augmented(images, seed=6, flip=True, crop=4), once)
    assert torch.equal(images, small_split().images)
