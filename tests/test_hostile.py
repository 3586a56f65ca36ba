"""Untrusted files: whatever they contain, there is one clear line, nothing is executed or overwritten, and memory stays
bounded. Damaged datasets are in tests/test_data.py, unusual images in tests/test_predict.py.
"""

import ast
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save, save_file

import evaluate
import predict
import train_mlp
from common.command_line import exit_status
from common.errors import UserError
from common.run_files import METRICS
from evaluation import finished_runs
from evaluation.finished_runs import FinishedRun, TestSet
from evaluation.images import read_image
from evaluation.publish import publish
from models import MAX_HEADER_BYTES, WeightsError, create_model, labeled, load_model, save_model
from tests.helpers import (
    ROOT,
    after_step,
    contents,
    drawn_once,  # noqa: F401 (a fixture)
    error_line,
    read_json,
    resume,
    train_tiny,
)
from tests.processes import linux_only, posix_only
from training import checkpoint
from training.checkpoint import Progress, read_checkpoint, restore
from training.optimizers import make_optimizers
from training.run_folder import RunFolder
from utils import load_test_set

SOURCES = sorted(path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests")
ROOM = 5 * 10**9  # bytes
HUGE = 2 * 10**9  # bytes that a bomb asks for: harmless to the machine, but no test passes if they are allocated
BOUND = 1.5e9  # bytes of memory for a process that refuses a file; PyTorch alone takes 0.4 GB


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Keep this process from growing by more than ROOM, on Linux, which tells its size."""
    size = Path("/proc/self/statm")
    if not size.exists():
        yield
        return
    import resource  # POSIX only

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        taken = int(size.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Bomb:
    """An object whose pickle creates the folder `trace` when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """The folder that a Bomb creates; at the end of the test it must not exist."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path)))
    path.rmdir()  # so it works
    yield path
    assert not path.exists()


def pickled(trace: Path) -> list[bytes]:
    """Pickles of a Bomb, bare and as PyTorch saves them."""
    saved = io.BytesIO()
    torch.save(Bomb(trace), saved)
    return [pickle.dumps(Bomb(trace)), saved.getvalue()]


def bit_flips(content: bytes, count: int, first_byte: int = 0) -> Iterator[bytes]:
    """The content with one bit changed, at `count` random places."""
    generator = random.Random(count)
    for _ in range(count):
        place = generator.randrange(8 * first_byte, 8 * len(content))
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


def in_a_process(*commands: tuple[str | Path, ...]) -> tuple[list[int], list[str], int]:
    """Run scripts in one new process; returns exit statuses, lines on stderr, and the peak memory in bytes.

    The peak is not ru_maxrss, which includes the memory of the process that started this one.
    """
    code = """
import json, re, sys
import evaluate, predict, train_mlp
from common.command_line import exit_status
statuses = [exit_status(lambda: globals()[script].main(words)) for script, *words in json.loads(sys.argv[1])]
(peak,) = re.findall("VmHWM: *([0-9]+) kB", open("/proc/self/status").read().expandtabs())
print(json.dumps([statuses, 1024 * int(peak)]))
"""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", code, words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    statuses, peak = json.loads(done.stdout.splitlines()[-1])
    return statuses, done.stderr.splitlines(), peak


def create_pipe(path: Path) -> None:
    os.mkfifo(path)  # reading it would never end


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")  # nor this


def create_folder(path: Path) -> None:
    path.mkdir()


PLACES = (create_pipe, link_to_a_device, create_folder)


# ---- Weights --------------------------------------------------------------------------------------------------------

TINY_MIRRORNET = {"widths": [4, 4, 4], "inner": [2, 2, 2]}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights file of a small network."""
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    torch.manual_seed(0)
    save_model(create_model("mirrornet", **TINY_MIRRORNET), path)
    return path.read_bytes()


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def metadata_of(content: bytes) -> dict[str, str]:
    return json.loads(content[8:header_size(content)])["__metadata__"]


def with_header(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def describing(content: bytes, arguments: Any, model: str = "mirrornet") -> bytes:
    """The weights file with a description of another network; `arguments` are JSON if they are bytes."""
    size = header_size(content)
    text = arguments.decode() if isinstance(arguments, bytes) else json.dumps(arguments)
    header = {**json.loads(content[8:size]), "__metadata__": {"model": model, "model_args": text}}
    return with_header(header, content[size:])


def refusal(path: Path, content: bytes) -> str:
    """The one-line error for a weights file with this content."""
    path.write_bytes(content)
    with pytest.raises(WeightsError) as refused, warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be another line on stderr
        load_model(path)
    line = str(refused.value)
    assert line.startswith(str(path)) and line.isprintable() and len(line) < 600
    return line


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F16") -> dict[str, Any]:
    """The entry of a tensor in the header of a safetensors file."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LENGTHS = (0, 1, 100_000_000, 100_000_001, 2**31, 2**63, 2**64 - 1)  # of a header, by its first eight bytes
HEADERS = (  # that do not fit a file with eight bytes of data
    b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"null", b"{}", b'{"__metadata__": 3}',
    {"a": tensor([4], 0, 8), "b": tensor([4], 4, 12)},  # they overlap
    {"a": tensor([4], 8, 16)}, {"a": tensor([4], 16, 8)}, {"a": tensor([4], -8, 0)},
    {"a": tensor([10**12], 0, 2 * 10**12)}, {"a": tensor([2**62, 4], 0, 8)}, {"a": tensor([2**63, 2**63], 0, 0)},
    {"a": tensor([10**30], 0, 8)}, {"a": tensor([1e400], 0, 8)}, {"a": tensor([4], 0, 8, dtype="F1024")},
    {f"a{number}": tensor([0], 0, 0) for number in range(20_000)},
)


def test_weights_with_a_flipped_header_bit_load_or_are_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for damaged in bit_flips(good[:header_size(good)], 300):
        path.write_bytes(damaged + good[header_size(good):])
        try:
            assert load_model(path).model_args.keys() == {"widths", "inner", "side", "num_classes"}
        except WeightsError as problem:
            assert str(problem).startswith(str(path)) and str(problem).isprintable()


def test_a_flipped_weight_bit_never_gives_nan(
    good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weights file has no checksum; `evaluate.py --check` notices such a bit in a published one by its SHA-256."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "x.png")
    for damaged in bit_flips(good, 60, first_byte=header_size(good)):
        (tmp_path / "x.safetensors").write_bytes(damaged)
        model = load_model(tmp_path / "x.safetensors")
        status = predict.report(model, [tmp_path / "x.png"], as_json=False, name="x")
        captured = capsys.readouterr()
        assert (status, captured.err.count("\n")) in ((0, 0), (1, 1)) and "nan" not in captured.out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 60000.0])
def test_weights_without_finite_logits_are_refused(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model("mlp", widths=(8, 8, 8))
    for parameter in model.parameters():
        parameter.data.fill_(value)
    model.fit_inputs(torch.rand(9, 3, 32, 32))
    save_model(model, tmp_path / "x.safetensors")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "x.png")
    assert exit_status(lambda: predict.main([str(tmp_path / "x.png"), "--model", str(tmp_path / "x.safetensors")])) == 1
    assert "not finite" in error_line(capsys)


def test_a_damaged_weights_file_is_refused(good: bytes, tmp_path: Path) -> None:
    path, tensors, metadata = tmp_path / "x.safetensors", load(good), metadata_of(good)
    with pytest.raises(WeightsError, match="missing"):
        load_model(path)
    name = "head.weight"
    for content in (
        b"", b"not a weights file\n", random.Random(0).randbytes(5000), good[:-1], good[:100], good + b"\0",
        save(tensors), save(tensors, {"model": "mirrornet"}), save(tensors, {**metadata, "model": "resnet"}),
        save({**tensors, name: torch.zeros(100, 5)}, metadata), save({**tensors, "extra": torch.zeros(3)}, metadata),
        save({other: values for other, values in tensors.items() if other != name}, metadata),
    ):
        refusal(path, content)


@pytest.mark.parametrize("length", LENGTHS)
def test_weights_with_an_impossible_header_length_are_refused(good: bytes, length: int, tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "x.safetensors", struct.pack("<Q", length) + good[8:])
    with pytest.raises(WeightsError, match="cannot be read"):
        labeled(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("label", "value"), [
    *(("temperature", text) for text in ("nan", "inf", "-1", "0", "1e-300", "1e300", "", "one", "9" * 5000)),
    ("classes", "cat dog"), ("classes", " ".join(["cat"] * 100)),
    ("classes", " ".join(f"\x1b[{label}m" for label in range(100))), ("classes", " ".join(map(str, range(101)))),
])
def test_weights_with_an_impossible_label_are_refused(good: bytes, label: str, value: str, tmp_path: Path) -> None:
    refusal(tmp_path / "x.safetensors", save(load(good), {**metadata_of(good), label: value}))


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_weights_with_a_header_that_does_not_fit_are_refused(header: Any, tmp_path: Path) -> None:
    refusal(tmp_path / "x.safetensors", with_header(header, bytes(8)))


@pytest.mark.parametrize(("model", "arguments"), [
    ("mirrornet", {**TINY_MIRRORNET, "widths": [10**9] * 3}),
    ("mirrornet", {**TINY_MIRRORNET, "inner": [2, 2, 10**9]}),
    ("mirrornet", {**TINY_MIRRORNET, "widths": [10**18] * 3}),
    ("mirrornet", {**TINY_MIRRORNET, "widths": [10**400] * 3}),
    ("mirrornet", {"widths": [4] * 10**6, "inner": [2] * 10**6}),
    ("mirrornet", {"widths": [10**9] * 3, "inner": [10**9] * 3}),
    ("mirrornet", {**TINY_MIRRORNET, "num_classes": 10**9}),
    ("mirrornet", {**TINY_MIRRORNET, "num_classes": 10}),
    ("mirrornet", {**TINY_MIRRORNET, "side": 10**9}),
    ("mirrornet", {**TINY_MIRRORNET, "side": 1000}),
    ("mlp", {"widths": [10**9]}), ("mlp", {"widths": [1] * 10**6}), ("mlp", {"side": 10**9}),
    ("resnet18", {"side": 10**9}),
    ("mirrornet", {"widths": [10**9] * 3, "inner": [2, 2, 2]}), ("mirrornet", {"widths": [4, 4, 10**9]}),
], ids=range(16))
def test_a_gigantic_network_is_not_built(good: bytes, model: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    refusal(tmp_path / "x.safetensors", describing(good, arguments, model))


@pytest.mark.parametrize("arguments", [
    b"", b"{", b"[" * 100_000, b"1e400", b"NaN", b'"\\ud800"', b"null", b"[1]", b'{"\\ud800": 1}',
    b'{"side": ' + 5000 * b"9" + b"}",
    *({**TINY_MIRRORNET, "side": side} for side in ("32", 0, -3, 1, None, [32], True, 1e400)),
    {"widths": 4, "inner": 2}, {"widths": "abc", "inner": "def"}, {"widths": dict(a=1, b=2, c=3), "inner": [2, 2, 2]},
    *({**TINY_MIRRORNET, "inner": inner} for inner in ([2, 2, 1.5], [2, 2, -2], [2, 2, True], [2, 2, 0], [2, 2, None])),
    {"widths": [4, 4], "inner": [2, 2]}, {"depth": 3},
    {"name": "mlp"}, {"\x1b[31m": 1}, {10**6 * "x": 1}, {**TINY_MIRRORNET, "num_classes": -10},
], ids=range(32))
def test_arguments_of_wrong_types_are_refused(good: bytes, arguments: Any, tmp_path: Path) -> None:
    refusal(tmp_path / "x.safetensors", describing(good, arguments))


def test_a_negative_slope_that_is_text_is_refused(tmp_path: Path) -> None:
    """No weight's shape depends on it, so the file fits the network that it describes."""
    path = tmp_path / "x.safetensors"
    save_model(create_model("mlp", widths=(4,)), path)
    assert load_model(path)
    refusal(path, describing(path.read_bytes(), {"widths": [4], "negative_slope": "steep"}, "mlp"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_weights_of_other_types_are_converted_or_refused(good: bytes, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(good)
    tensors = {name: values.to(dtype) for name, values in load_model(path).state_dict().items()}
    save_file(tensors, path, {"model": "mirrornet", "model_args": json.dumps(TINY_MIRRORNET)})
    if dtype == torch.float8_e4m3fn:
        assert next(load_model(path).parameters()).dtype == torch.float32
    else:
        refusal(path, path.read_bytes())


@posix_only
@pytest.mark.parametrize("create", PLACES)
def test_weights_that_are_not_a_file_are_refused(create: Callable[[Path], None], tmp_path: Path) -> None:
    create(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="not a file"):
        load_model(tmp_path / "x.safetensors")


# ---- The folder of a finished run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with one run on synthetic images, mlp-s0, already measured. Tests work on copies."""
    results_dir = tmp_path_factory.mktemp("finished")
    assert train_tiny(results_dir, "--train-on-all", "--epochs", "1") == 0
    assert exit_status(lambda: evaluate.main(["mlp-s0", "--results-dir", str(results_dir)])) == 0
    return results_dir


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    return shutil.copytree(finished / "mlp-s0", tmp_path / "results" / "mlp-s0")


def evaluate_run(run: Path) -> int:
    return exit_status(lambda: evaluate.main([run.name, "--results-dir", str(run.parent)]))


def assert_refused(run: Path, file: str, status: int, before: dict[Path, bytes],
                   capsys: pytest.CaptureFixture[str]) -> None:
    assert status == 2
    assert str(run / file) in error_line(capsys)
    assert contents(run) == before


NOT_JSON = (b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{}", b"\x00", b"\x80\x02.")
WRONG_JSON = (b"null", b"true", b"[]", b"{}", b'"\\ud800"', b"1e400", b"NaN", b'[{"settings": {}}]',
              b'{"settings": [], "command": "", "git_changes": false}')


@pytest.mark.parametrize("file", ["config.json", "result.json"])
def test_json_without_the_run_in_it_is_refused(own: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (*NOT_JSON, *WRONG_JSON):
        (own / file).write_bytes(content)
        before = contents(own)
        assert_refused(own, file, evaluate_run(own), before, capsys)


@pytest.mark.parametrize(("file", "name", "values"), [
    ("settings", "synthetic", ("no", 1, None, [])),
    ("settings", "recipe", (3, None, "\ud800", "\x1b[31m")),
    ("settings", "seed", ("0", 1e400, -1, True, [])),
    ("settings", "train_on_all", ("yes", 0)),
    ("result", "parameters", ("many", None, 1e400, 10**400, -1, [])),
    ("result", "train_seconds", ("long", float("nan"), 1e400, 10**400)),
    ("result", "machine", ("fast", None, [1])),
])
def test_json_with_an_impossible_value_is_refused(
    own: Path, file: str, name: str, values: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = own / ("config.json" if file == "settings" else "result.json")
    content = read_json(path)
    for value in values:
        (content["settings"] if file == "settings" else content)[name] = value
        path.write_text(json.dumps(content))
        before = contents(own)
        assert_refused(own, path.name, evaluate_run(own), before, capsys)


@pytest.mark.parametrize("recipe", ["../../outside", "..", "", "a/b", "/outside"])
def test_a_recipe_that_is_a_path_is_not_published(own: Path, recipe: str) -> None:
    config = read_json(own / "config.json")
    config |= {"command": "python train_mlp.py --train-on-all --seed 0", "git_changes": False}
    config["settings"] |= {"synthetic": False, "recipe": recipe}
    (own / "config.json").write_text(json.dumps(config))
    before = contents(own.parents[1])
    with pytest.raises(UserError, match="impossible recipe"):
        publish("mlp-s0", own.parent, TestSet("", synthetic=True))
    assert contents(own.parents[1]) == before


@posix_only
@pytest.mark.parametrize("file", ["config.json", "result.json", "predictions.npz", "model.safetensors"])
@pytest.mark.parametrize("create", PLACES)
def test_a_runs_file_that_is_not_a_file_is_refused(
    own: Path, file: str, create: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    (own / file).unlink()
    create(own / file)
    before = contents(own)
    assert_refused(own, file, evaluate_run(own), before, capsys)


@pytest.mark.parametrize("content", [
    b"", b"epoch,train_loss\n", b"\xff\xfe\n1\n", b"a,b\n1,x\n", b"a,b\n1,2\n", b"epoch\n" + 200_000 * b"9",
    b"epoch,train_loss\n1,2,3,4\n", b"epoch\n" + b'"' + 200_000 * b"a",
], ids=range(8))
def test_hostile_metrics_are_refused(own: Path, content: bytes) -> None:
    (own / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.csv"):
        FinishedRun(own).curves()


def test_a_hostile_list_of_near_duplicates_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished_runs, "load_test_set", lambda *_, **__: load_test_set("", use_synthetic=True))
    path = tmp_path / "near_duplicates.csv"
    for content in (b"test_hash\n" + 300_000 * b"f", b"\xff\xfe\n1\n", b'test_hash\n"' + 200_000 * b"f",
                    b"test_hash\nzz\n", b"a\n1\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"near_duplicates\.csv"):
            TestSet("", near_duplicates=path)


def npz(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def write_zeros(archive: zipfile.ZipFile, name: str, size: int, begin: bytes = b"") -> None:
    """Add a record of `size` bytes of zeros after `begin`, which take a thousandth of that."""
    record = zipfile.ZipInfo(name)
    record.compress_type, record._compresslevel = zipfile.ZIP_DEFLATED, 1  # fast
    with archive.open(record, "w", force_zip64=True) as file:
        file.write(begin)
        for _ in range(size // 10**7):
            file.write(bytes(10**7))


def bombed_npz(shape: tuple[int, ...], size: int) -> bytes:
    """Predictions whose logits have this shape by their header, followed by `size` compressed bytes of zeros."""
    content, header = io.BytesIO(npz(hash=np.zeros(1, np.uint64), weights_sha256=np.array(""))), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(content, "a") as archive:
        write_zeros(archive, "logits.npy", size, begin=header.getvalue())
    return content.getvalue()


def kept(run: Path) -> dict[str, Any]:
    """The arrays in a run's predictions."""
    with np.load(run / "predictions.npz") as file:
        return dict(file)


def repacked(kept: dict[str, Any]) -> bytes:
    """The arrays compressed by bzip2, a few bytes of which may unpack to gigabytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(npz(**kept))) as one, zipfile.ZipFile(content, "w", zipfile.ZIP_BZIP2) as other:
        for name in one.namelist():
            other.writestr(name, one.read(name))
    return content.getvalue()


HOSTILE_PREDICTIONS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "empty": lambda kept: b"",
    "text": lambda kept: b"hello",
    "truncated": lambda kept: npz(**kept)[:-200],
    "another compression": repacked,
    "a single array": lambda kept: b"\x93NUMPY\x01\x00" + 200 * b" ",
    "no logits": lambda kept: npz(**{**kept, "logits": np.zeros(0)}),
    "an array missing": lambda kept: npz(hash=kept["hash"]),
    "wrong class count": lambda kept: npz(**{**kept, "logits": kept["logits"][:, :10]}),
    "images missing": lambda kept: npz(**{**kept, "logits": kept["logits"][:-1]}),
    "one dimension": lambda kept: npz(**{**kept, "logits": kept["logits"].ravel()}),
    "no dimension": lambda kept: npz(**{**kept, "logits": np.float16(1), "hash": np.uint64(1)}),
    "complex numbers": lambda kept: npz(**{**kept, "logits": kept["logits"].astype(complex)}),
    "text instead of numbers": lambda kept: npz(**{**kept, "logits": kept["logits"].astype(str)}),
    "not finite": lambda kept: npz(**{**kept, "logits": np.full_like(kept["logits"], np.nan)}),
    "other hashes": lambda kept: npz(**{**kept, "hash": kept["hash"][::-1]}),
    "a shape beyond the data": lambda kept: bombed_npz((10**12, 100), 10**7),
    "zeros that unpack to 20 MB": lambda kept: bombed_npz((10**5, 100), 2 * 10**7),
}


@pytest.mark.parametrize("make", HOSTILE_PREDICTIONS.values(), ids=HOSTILE_PREDICTIONS.keys())
def test_hostile_predictions_are_refused(
    own: Path, make: Callable[[dict[str, Any]], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "predictions.npz").write_bytes(make(kept(own)))
    before = contents(own)
    assert_refused(own, "predictions.npz", evaluate_run(own), before, capsys)


def test_predictions_are_never_unpickled(own: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bombs = np.array([Bomb(trace)], dtype=object)
    for content in (npz(**{**kept(own), "logits": bombs}), pickle.dumps(Bomb(trace))):
        (own / "predictions.npz").write_bytes(content)
        before = contents(own)
        assert_refused(own, "predictions.npz", evaluate_run(own), before, capsys)


def test_a_flipped_prediction_bit_is_refused_or_harmless(own: Path) -> None:
    """Each array has a checksum in its archive. The rest, such as dates, is not used."""
    test = TestSet("", synthetic=True)
    logits, path = FinishedRun(own).logits(test), own / "predictions.npz"
    for damaged in bit_flips(path.read_bytes(), 50):
        path.write_bytes(damaged)
        try:
            assert np.array_equal(FinishedRun(own).logits(test), logits)
        except UserError as problem:
            assert str(path) in str(problem)


def test_a_finished_run_with_hostile_weights_is_refused(
    own: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last weights are those of a network with 10 classes."""
    path = own / "model.safetensors"
    save_model(create_model("mlp", widths=(8,), num_classes=10), path)
    for content in (b"", b"no weights", b"\x80\x02.", struct.pack("<Q", 2**63), *pickled(trace), path.read_bytes()):
        path.write_bytes(content)
        before = contents(own)
        assert_refused(own, path.name, evaluate_run(own), before, capsys)


def test_a_hostile_results_table_is_one_line_in_predict(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (
        *NOT_JSON, *WRONG_JSON, b"[1]", b'[{"recipe": "mlp"}]', b'[{"top1": 3}]', b'[{"top1": {"mean": "x"}}]',
        b'[{"top1": {"mean": 1}, "recipe": "mlp", "seeds": 3}]', b'[{"top1": {"mean": 1e400}}]',
    ):
        (own.parent / "results.json").write_bytes(content)
        assert exit_status(lambda: predict.main(["x.png", "--results-dir", str(own.parent)])) == 2
        assert "--model" in (line := error_line(capsys)) or "results.json" in line


# ---- Checkpoints, and the settings they are resumed with ------------------------------------------------------------

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint-previous.safetensors"
WEIGHT, MEMORY, STEP = "model.head.weight", "optimizer.0.0.exp_avg", "optimizer.0.0.step"  # some of its tensors


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a run, mlp-s0, stopped after step 3, with checkpoints of steps 2 and 3."""
    results_dir = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert train_tiny(results_dir, "--epochs", "1", "--checkpoint-every", "0") == 130
    return results_dir


@pytest.fixture
def stopped(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    return shutil.copytree(interrupted / "mlp-s0", tmp_path / "results" / "mlp-s0")


@pytest.fixture
def alone(stopped: Path) -> Path:
    """The same without the previous checkpoint."""
    (stopped / PREVIOUS).unlink()
    return stopped


def restored(run: Path) -> Progress:
    """The progress in a run's checkpoint, which is put into a new network and optimizer."""
    settings = train_mlp.MLPSettings.from_config(read_json(run / "config.json")["settings"])
    with RunFolder(run, settings, train_mlp.SCRIPT, 1) as opened:
        saved = opened.load_checkpoint()
    model = train_mlp.build_model(settings)
    return restore(saved, model, make_optimizers(model, settings), run.name, settings.epochs)


def assert_not_restored(run: Path) -> str:
    """The one-line error when the run's checkpoint is restored; no file changes."""
    before = contents(run)
    with pytest.raises(UserError) as refused, warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be another line on stderr
        restored(run)
    assert contents(run) == before
    line = str(refused.value)
    assert "mlp-s0" in line and "\n" not in line and len(line) < 600
    return line


def forged(content: bytes, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> bytes:
    """A checkpoint with changed tensors or JSON and the SHA-256 that fits them."""
    tensors, rest = load(content), json.loads(metadata_of(content)["rest"])
    change(tensors, rest)
    return sealed(tensors, json.dumps(rest))


def sealed(tensors: dict[str, torch.Tensor], rest: str) -> bytes:
    return save(tensors, {"rest": rest, "sha256": checkpoint._digest(tensors, rest)})


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "text": lambda good: b"not a checkpoint\n",
    "a pickle": lambda good: pickle.dumps({"settings": {}}),
    "a zip archive": lambda good: npz(a=np.zeros(3)),
    "cut short": lambda good: good[:-1],
    "one byte too long": lambda good: good + b"\0",
    "another file in front": lambda good: pickle.dumps({}) + good,
    "weights of a network": lambda good: save({"head.weight": torch.zeros(3)}, {"model": "mlp", "model_args": "{}"}),
    "no metadata": lambda good: save(load(good)),
    "no SHA-256": lambda good: save(load(good), {"rest": metadata_of(good)["rest"]}),
    "another SHA-256": lambda good: save(load(good), {**metadata_of(good), "sha256": "0" * 64}),
    "only metadata": lambda good: save({}, metadata_of(good)),
    "100,001 tensors": lambda good: with_header({
        "__metadata__": metadata_of(good), **{str(number): tensor([0], 0, 0) for number in range(100_001)}}),
    **{f"JSON {number}": lambda good, text=text: sealed(load(good), text) for number, text in enumerate((
        "", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "null", "true", "[]", "{}", "NaN", '"\\ud800"',
        '{"settings": []}', '{"settings": null}', "[" + 2**22 * "[],[]" + "]"))},
}


@pytest.mark.parametrize("make", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_falls_back_or_is_refused(
    stopped: Path, make: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = make((stopped / CHECKPOINT).read_bytes())
    (stopped / CHECKPOINT).write_bytes(damaged)
    assert restored(stopped).step == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {stopped / CHECKPOINT} is damaged") and len(line) < 600
    assert not (stopped / PREVIOUS).exists()
    (stopped / CHECKPOINT).write_bytes(damaged)
    assert "delete it" in assert_not_restored(stopped)


def test_a_truncated_checkpoint_is_noticed(alone: Path) -> None:
    content = (alone / CHECKPOINT).read_bytes()
    size, generator = header_size(content), random.Random(0)
    lengths = [0, 1, 7, 8, 9, 100, size - 1, size, size + 1, len(content) - 1,
               *(generator.randrange(len(content)) for _ in range(40))]
    for length in lengths:
        (alone / CHECKPOINT).write_bytes(content[:length])
        with pytest.raises(ValueError):
            read_checkpoint(alone / CHECKPOINT)


def test_every_random_edit_of_a_checkpoint_is_noticed(alone: Path) -> None:
    """Flipped bits, and bytes that are replaced, removed or inserted, every second time in the header."""
    content = (alone / CHECKPOINT).read_bytes()
    generator = random.Random(0)
    edits = 0
    for number in range(240):
        place = generator.randrange(header_size(content) if number % 2 else len(content))
        old, byte = content[place:place + 1], generator.randbytes(1)
        new = generator.choice([bytes([old[0] ^ 1 << generator.randrange(8)]), byte, b"", byte + old, b" " + old])
        damaged = content[:place] + new + content[place + 1:]
        if damaged == content:
            continue
        (alone / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(ValueError):
            read_checkpoint(alone / CHECKPOINT)
        edits += 1
    assert edits > 200


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_checkpoints_header_that_does_not_fit_is_refused(header: Any, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(with_header(header, bytes(8)))
    with pytest.raises(ValueError):
        read_checkpoint(tmp_path / CHECKPOINT)


def test_a_checkpoint_whose_header_is_too_long_is_refused(alone: Path) -> None:
    content = (alone / CHECKPOINT).read_bytes()
    for length in LENGTHS:
        (alone / CHECKPOINT).write_bytes(struct.pack("<Q", length) + content[8:])
        with pytest.raises(ValueError):
            read_checkpoint(alone / CHECKPOINT)


def first_ten_classes(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    tensors |= {name: values[:10].clone() for name, values in tensors.items() if name.startswith("model.head")}


def drop(*names: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], object]:
    """A change that removes all tensors whose names end so."""
    return lambda tensors, rest: [tensors.pop(name) for name in list(tensors) if name.endswith(names)]


def row(**values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(METRICS, 1.0), "epoch": 1, **values}


FORGERIES: dict[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], object]] = {
    "weight of another shape": lambda tensors, rest: tensors.update({WEIGHT: torch.zeros(3, 3)}),
    "weight missing": lambda tensors, rest: tensors.pop(WEIGHT),
    "weight added": lambda tensors, rest: tensors.update({"model.extra": torch.zeros(3)}),
    "tensor of no use": lambda tensors, rest: tensors.update({"extra": torch.zeros(3)}),
    "second optimizer": lambda tensors, rest: tensors.update({MEMORY.replace("0", "1", 1): tensors[MEMORY].clone()}),
    "no tensors": lambda tensors, rest: tensors.clear(),
    "other class count": first_ten_classes,
    **{f"weight of {dtype}": lambda tensors, rest, dtype=dtype: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)})
       for dtype in (torch.int64, torch.complex64, torch.float16, torch.float8_e4m3fn, torch.bool)},
    "optimizer without one tensor": lambda tensors, rest: tensors.pop(MEMORY),
    "optimizer without one parameter": drop(".0.0.exp_avg", ".0.0.exp_avg_sq", ".0.0.step"),
    "optimizer without averages": drop(".exp_avg"),
    "optimizer without steps": drop(".step"),
    **{f"optimizer with {name}": lambda tensors, rest, name=name: tensors.update({f"optimizer.0{name}": torch.ones(3)})
       for name in (".999.exp_avg", ".-1.exp_avg", ".first.exp_avg", ".0.momentum", ".0", ".", ".0.exp_avg.more")},
    "averages of another shape": lambda tensors, rest: tensors.update({MEMORY: torch.zeros(3, 3)}),
    "averages of another type": lambda tensors, rest: tensors.update({MEMORY: tensors[MEMORY].to(torch.complex64)}),
    "a step that is a vector": lambda tensors, rest: tensors.update({STEP: torch.ones(3)}),
    **{f"a step of {value}": lambda tensors, rest, value=value: tensors.update({STEP: torch.tensor(value)})
       for value in (0.0, -1.0, -1000.0, float("nan"), 3, True)},
    "other settings": lambda tensors, rest: rest["settings"].update(lr=0.5),
    "settings of other types": lambda tensors, rest: rest.update(settings={name: [{}] for name in rest["settings"]}),
    "settings missing": lambda tensors, rest: rest.update(settings={}),
    "progress missing": lambda tensors, rest: rest.pop("progress"),
    **{f"progress {value}": lambda tensors, rest, value=value: rest.update(progress=value)
       for value in ({}, [], 3, None, {"step": 3})},
    **{f"{name} {value if value != 10**400 else '10**400'}":
       lambda tensors, rest, name=name, value=value: rest["progress"].update({name: value})
       for name, value in (
           *(("epoch", value) for value in ("third", None, True, 1.0, -1, 1, 2, 10**9, 10**400)),
           *(("step", value) for value in ("third", None, True, 1.5, -1, 10**9, 10**400)),
           *(("images", value) for value in ("many", -1, 0, 10**400)),
           *(("correct", value) for value in ("many", -1, 10**400)),
           *(("loss", value) for value in ("small", None, [], True, float("nan"), float("inf"), 10**400)),
           *(("seconds", value) for value in ("few", None, float("-inf"), 10**400)),
           *(("rows", value) for value in (None, 3, [1], [{}], [[]], [row()])), ("unknown", 1))},
    **{f"row {number}": lambda tensors, rest, change=change: rest["progress"].update(
        epoch=1, step=0, rows=[row(**change)]) for number, change in enumerate((
            {"epoch": 2}, {"epoch": "1"}, {"train_loss": None}, {"train_loss": "small"}, {"val_acc": [1]},
            {"seconds": 0}, {"seconds": None}, {"lr": 10**400}, {"unknown": 1}))},
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_checkpoint_is_refused(
    alone: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]
) -> None:
    (alone / CHECKPOINT).write_bytes(forged((alone / CHECKPOINT).read_bytes(), change))
    assert_not_restored(alone)


def test_forging_without_changes_gives_a_valid_checkpoint(alone: Path) -> None:
    for change in (lambda tensors, rest: None,
                   lambda tensors, rest: rest["progress"].update(epoch=1, step=0, rows=[row(val_acc=None)])):
        (alone / CHECKPOINT).write_bytes(forged((alone / CHECKPOINT).read_bytes(), change))
        restored(alone)


@pytest.mark.parametrize("change", [
    FORGERIES["weight of another shape"],
    FORGERIES["other settings"],
    lambda tensors, rest: tensors.update({WEIGHT: torch.full_like(tensors[WEIGHT], torch.nan)}),
    lambda tensors, rest: tensors.update({MEMORY + "_sq": torch.full_like(tensors[MEMORY], -1.0)}),
], ids=["shape", "settings", "NaN", "negative variance"])
def test_a_resumed_training_refuses_forgeries_in_one_line(
    alone: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (alone / CHECKPOINT).write_bytes(forged((alone / CHECKPOINT).read_bytes(), change))
    before = contents(alone)
    assert resume(alone.parent, "mlp-s0") == 2
    assert "mlp-s0" in error_line(capsys)
    assert contents(alone) == before


def test_checkpoints_execute_nothing(alone: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in pickled(trace):
        (alone / CHECKPOINT).write_bytes(content)
        before = contents(alone)
        assert_refused(alone, CHECKPOINT, resume(alone.parent, "mlp-s0"), before, capsys)


@posix_only
@pytest.mark.parametrize("create", PLACES)
def test_a_checkpoint_that_is_not_a_file_is_refused(alone: Path, create: Callable[[Path], None]) -> None:
    (alone / CHECKPOINT).unlink()
    create(alone / CHECKPOINT)
    assert "not a file" in assert_not_restored(alone)


@posix_only
@pytest.mark.parametrize("create", PLACES[:2])
def test_a_pipe_or_device_falls_back_to_the_previous_checkpoint(
    stopped: Path, create: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / CHECKPOINT).unlink()
    create(stopped / CHECKPOINT)
    assert restored(stopped).step == 2
    assert "not a file" in capsys.readouterr().err


def test_hostile_settings_are_not_resumed(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (*NOT_JSON, *WRONG_JSON):
        (stopped / "config.json").write_bytes(content)
        before = contents(stopped)
        assert resume(stopped.parent, "mlp-s0") == 2
        assert "config.json" in error_line(capsys)
        assert contents(stopped) == before


@pytest.mark.parametrize(("name", "values"), [
    ("epochs", ("1", 1e400, True, 10**12)), ("batch_size", (-5,)), ("seed", (-1, 1.5)), ("data_dir", (3,)),
    ("widths", ("8", ["8"], [[8]], [10**9], [8] * 10**6, [])), ("lr", (float("nan"), "0.1", 10**400)),
    ("optimizer", ("os.system",)), ("recipe", (3,)), ("synthetic", ("yes",)), ("side", (10**9,)), ("unknown", (1,)),
])
def test_impossible_settings_are_not_resumed(
    stopped: Path, name: str, values: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_json(stopped / "config.json")
    for value in values:
        config["settings"][name] = value
        (stopped / "config.json").write_text(json.dumps(config))
        before = contents(stopped)
        assert resume(stopped.parent, "mlp-s0") == 2
        error_line(capsys)
        assert contents(stopped) == before


# ---- Memory ---------------------------------------------------------------------------------------------------------


def zeros(size: int) -> bytes:
    """`size` bytes of zeros, compressed."""
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(bytes(10**7)) for _ in range(size // 10**7)), packer.flush()])


def png(width: int, height: int, kind: bytes, content: bytes) -> bytes:
    """An RGBA image of this size by its header, with one chunk of this kind."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(kind, content) + chunk(b"IEND", b"")


@linux_only
@pytest.mark.slow
def test_bombs_take_little_memory(finished: Path, interrupted: Path, good: bytes, tmp_path: Path) -> None:
    """Every kind of file that could ask for gigabytes, through its script, in processes whose peak is measured."""
    commands: list[tuple[str | Path, ...]] = []

    def resuming(content: bytes) -> None:
        folder = tmp_path / f"results{len(commands)}"
        shutil.copytree(interrupted, folder)
        for file in (CHECKPOINT, PREVIOUS):
            (folder / "mlp-s0" / file).write_bytes(content)
        commands.append(("train_mlp", "--resume", "mlp-s0", "--results-dir", folder))

    def evaluating(file: str, content: bytes) -> None:
        folder = tmp_path / f"results{len(commands)}"
        shutil.copytree(finished, folder)
        (folder / "mlp-s0" / file).write_bytes(content)
        commands.append(("evaluate", "mlp-s0", "--results-dir", folder))

    # Headers that would unpack to gigabytes, and of the largest allowed size.
    headers = [with_header((10**8 - 2) * b" " + b"{}"), with_header(b'{"a":' + 30_000_000 * b"[1],")]
    for count in (1_000_000, 220_000):
        entry = json.dumps(tensor([0], 0, 0)).encode()
        headers.append(with_header(b"{" + b",".join(b'"%x":%b' % (number, entry) for number in range(count)) + b"}"))
    for count in (6_000_000, 1_400_000):
        names = b",".join(b'"%x":""' % number for number in range(count))
        headers.append(with_header(b'{"__metadata__":{' + names + b"}}"))
    assert sum(header_size(header) < MAX_HEADER_BYTES for header in headers) == 2
    tensors = load((interrupted / "mlp-s0" / CHECKPOINT).read_bytes())
    for content in (*headers, sealed(tensors, "[" + 5_000_000 * "[]," + "0]"), with_header(HEADERS[10])):
        resuming(content)
    evaluating("predictions.npz", bombed_npz((HUGE // 200, 100), HUGE))
    evaluating("predictions.npz", bombed_npz((10**12, 100), 10**7))
    evaluating("model.safetensors", describing(good, {**TINY_MIRRORNET, "side": 10**9}))
    evaluating("model.safetensors", describing(good, {**TINY_MIRRORNET, "inner": [2, 2, 10**9]}))
    for content in headers:
        evaluating("model.safetensors", content)
    images: list[tuple[str | Path, ...]] = []
    (tmp_path / "good.safetensors").write_bytes(good)
    for number, image in enumerate((
            png(30_000, 30_000, b"IDAT", zeros(HUGE)), png(8, 8, b"zTXt", b"a\0\0" + zeros(HUGE)),
            png(8000, 8000, b"IDAT", zeros(HUGE // 10)))):
        (tmp_path / f"{number}.png").write_bytes(image)
        images.append(("predict", tmp_path / f"{number}.png", "--model", tmp_path / "good.safetensors"))
    for group, status in ((commands, 2), (images, 1)):
        statuses, lines, peak = in_a_process(*group)
        assert statuses == [status] * len(group)
        assert len(lines) == len(group) and all(line.startswith("error: ") for line in lines), lines
        assert peak < BOUND


# ---- Images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_an_image_with_a_flipped_bit_is_read_or_refused(
    suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"x.{suffix}")
    for damaged in bit_flips((tmp_path / f"x.{suffix}").read_bytes(), 50):
        (tmp_path / f"y.{suffix}").write_bytes(damaged)
        try:
            image = read_image(tmp_path / f"y.{suffix}")
            assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        except UserError as problem:
            assert str(problem).startswith(str(tmp_path)) and "\n" not in str(problem)
    assert capfd.readouterr() == ("", "")


# ---- Calls that the sources must not contain ------------------------------------------------------------------------

UNSAFE_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve",
                  "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "torch.hub.load",
                "pandas.read_pickle", "np.fromregex", "subprocess.getoutput", "subprocess.getstatusoutput"}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """The imports and calls of a module that could execute the content of a file."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name.split(".")[0] in UNSAFE_IMPORTS)
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy", "os"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name in ("load", "system"))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in UNSAFE_CALLS or (name == "torch.load" and given.get("weights_only") != "True"):
            yield name
        if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
            yield f"{name} with {given}"


@pytest.mark.parametrize("source", [
    "import pickle", "from dill import loads", "torch.load(f)", "torch.load(f, weights_only=False)",
    "torch.load(f, weights_only=w)", "from torch import load", "np.load(f, allow_pickle=True)", "eval(text)",
    "subprocess.run(words, shell=True)", "os.system(words)", "import yaml"])
def test_unsafe_code_is_found(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


def test_no_source_executes_the_content_of_a_file() -> None:
    found = {str(path): list(unsafe(ast.parse(path.read_text(encoding="utf-8")))) for path in SOURCES}
    assert {path: calls for path, calls in found.items() if calls} == {}
