"""Files from strangers: whatever stands in them, there is one clear line, nothing is executed, nothing is overwritten,
and memory stays bounded. Damaged data sets are in tests/test_data.py, odd pictures in tests/test_predict.py.
"""

import ast
import io
import json
import os
import pickle
import random
import resource
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
from safetensors.torch import save_file

import evaluate
import evaluation.runs
import predict
import train_mlp
from evaluation.pictures import read_picture
from evaluation.publish import publish
from evaluation.runs import FinishedRun, TestPictures
from models import WeightsError, create_model, load_model, save_model
from runs import Run
from settings import exit_status
from tests.helpers import (
    ROOT,
    after_step,
    contents,
    drawn_once,  # noqa: F401 (a fixture)
    error_line,
    leaves,
    read_json,
    resume,
    train_tiny,
)
from utils import UserError, load_test_set

SOURCES = sorted(path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests")
ROOM = 5 * 10**9  # bytes
HUGE = 2 * 10**9  # bytes that a bomb asks for: no machine is harmed, and no test passes that allows it
BOUND = 1.5e9  # bytes that a process may take while it refuses a file; PyTorch alone takes 0.4 GB


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Whatever a file here asks for, this process cannot grow by more than ROOM, where Linux says how large it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = Path("/proc/self/statm")
    if size.exists() and soft == resource.RLIM_INFINITY:
        taken = int(size.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Bomb:
    """What makes the folder `trace` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """Where a bomb leaves a folder; that none did is checked at the end."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path)))
    path.rmdir()  # so it works
    yield path
    assert not path.exists()


def bit_flips(content: bytes, count: int, first_byte: int = 0) -> Iterator[bytes]:
    """The content with one bit changed, at `count` random places."""
    generator = random.Random(count)
    for _ in range(count):
        place = generator.randrange(8 * first_byte, 8 * len(content))
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


def in_a_process(*commands: tuple[str | Path, ...]) -> tuple[list[int], list[str], int]:
    """Scripts' exit statuses, the lines on stderr, and the most bytes of memory that they took, in one new process.

    Of that ru_maxrss would be wrong: it counts what the process that started this one took before.
    """
    code = """
import json, re, sys
import evaluate, predict, train_mlp
from settings import exit_status
statuses = [exit_status(lambda: globals()[script].main(words)) for script, *words in json.loads(sys.argv[1])]
(peak,) = re.findall("VmHWM: *([0-9]+) kB", open("/proc/self/status").read().expandtabs())
print(json.dumps([statuses, 1024 * int(peak)]))
"""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", code, words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    statuses, peak = json.loads(done.stdout.splitlines()[-1])
    return statuses, done.stderr.splitlines(), peak


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------

TINY_CONVNET = {"widths": [4], "blocks": [1]}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights file of a small network."""
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    torch.manual_seed(0)
    save_model(create_model("convnet", **TINY_CONVNET), path)
    return path.read_bytes()


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def with_header(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def describing(content: bytes, arguments: Any, model: str = "convnet") -> bytes:
    """The weights file with a description of another network; `arguments` are JSON if they are bytes."""
    size = header_size(content)
    text = arguments.decode() if isinstance(arguments, bytes) else json.dumps(arguments)
    header = {**json.loads(content[8:size]), "__metadata__": {"model": model, "model_args": text}}
    return with_header(header, content[size:])


def refusal(path: Path, content: bytes) -> str:
    """What is said, in one line of a readable length, of a weights file with this content."""
    path.write_bytes(content)
    with pytest.raises(WeightsError) as refused, warnings.catch_warnings():
        warnings.simplefilter("error")  # they would be lines on stderr too
        load_model(path)
    line = str(refused.value)
    assert line.startswith(str(path)) and line.isprintable() and len(line) < 600
    return line


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_weights_with_any_bit_of_the_header_flipped_load_or_are_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for damaged in bit_flips(good[:header_size(good)], 300):
        path.write_bytes(damaged + good[header_size(good):])
        try:
            assert load_model(path).model_args.keys() == {"widths", "blocks", "side", "num_classes"}
        except WeightsError as problem:
            assert str(problem).startswith(str(path)) and str(problem).isprintable()


def test_a_flipped_bit_of_a_weight_is_answered_or_refused_and_never_an_answer_that_is_no_number(
    good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No weights file can tell such a bit by itself; that of a published run does not fit its predictions any more."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "x.png")
    for damaged in bit_flips(good, 60, first_byte=header_size(good)):
        (tmp_path / "x.safetensors").write_bytes(damaged)
        status = exit_status(lambda: predict.main([str(tmp_path / "x.png"), "--model",
                                                   str(tmp_path / "x.safetensors")]))
        captured = capsys.readouterr()
        assert (status, captured.err.count("\n")) in ((0, 0), (1, 1)) and "nan" not in captured.out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 60000.0])
def test_weights_that_give_no_finite_logits_are_refused(
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


@pytest.mark.parametrize("length", [0, 1, 100_000_000, 100_000_001, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_an_impossible_length_is_refused(good: bytes, length: int, tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "x.safetensors", struct.pack("<Q", length) + good[8:])


@pytest.mark.parametrize("header", [
    b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"null", b"{}", b'{"__metadata__": 3}',
    {"a": tensor([4], 0, 8), "b": tensor([4], 4, 12)},  # they overlap
    {"a": tensor([4], 8, 16)}, {"a": tensor([4], 16, 8)}, {"a": tensor([4], -8, 0)},
    {"a": tensor([10**12], 0, 2 * 10**12)}, {"a": tensor([2**62, 4], 0, 8)}, {"a": tensor([2**63, 2**63], 0, 0)},
    {"a": tensor([10**30], 0, 8)}, {"a": tensor([1e400], 0, 8)}, {"a": tensor([4], 0, 8, dtype="F1024")},
    {f"a{number}": tensor([0], 0, 0) for number in range(20_000)},
], ids=range(17))
def test_a_header_that_does_not_fit_its_file_is_refused(header: Any, tmp_path: Path) -> None:
    refusal(tmp_path / "x.safetensors", with_header(header, bytes(8)))


@pytest.mark.parametrize(("model", "arguments"), [
    ("convnet", {"widths": [10**9], "blocks": [1]}),
    ("convnet", {"widths": [4], "blocks": [10**9]}),
    ("convnet", {"widths": [10**18], "blocks": [1]}),
    ("convnet", {"widths": [10**400], "blocks": [1]}),
    ("convnet", {"widths": [4] * 10**6, "blocks": [1] * 10**6}),
    ("convnet", {"widths": [4] * 10**6, "blocks": [0] * 10**6}),
    ("convnet", {**TINY_CONVNET, "num_classes": 10**9}),
    ("convnet", {**TINY_CONVNET, "num_classes": 10}),
    ("convnet", {**TINY_CONVNET, "side": 10**9}),
    ("convnet", {**TINY_CONVNET, "side": 1000}),
    ("mlp", {"widths": [10**9]}), ("mlp", {"widths": [1] * 10**6}), ("mlp", {"side": 10**9}),
    ("resnet18", {"side": 10**9}), ("wide_resnet", {"depth": 6 * 10**11 + 4}), ("wide_resnet", {"width": 10**12}),
], ids=range(16))
def test_a_gigantic_network_is_not_built(good: bytes, model: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    refusal(tmp_path / "x.safetensors", describing(good, arguments, model))


@pytest.mark.parametrize("arguments", [
    b"", b"{", b"[" * 100_000, b"1e400", b"NaN", b'"\\ud800"', b"null", b"[1]", b'{"\\ud800": 1}',
    b'{"side": ' + 5000 * b"9" + b"}",
    *({**TINY_CONVNET, "side": side} for side in ("32", 0, -3, 1, None, [32], True, 1e400)),
    {"widths": 4, "blocks": 1}, {"widths": "a", "blocks": "b"}, {"widths": {"a": 1}, "blocks": {"b": 1}},
    {"widths": [4], "blocks": [1.5]}, {"widths": [-4], "blocks": [1]}, {"widths": [True], "blocks": [1]},
    {"name": "mlp"}, {"\x1b[31m": 1}, {10**6 * "x": 1}, {**TINY_CONVNET, "num_classes": -10},
], ids=range(28))
def test_arguments_of_wrong_types_are_refused(good: bytes, arguments: Any, tmp_path: Path) -> None:
    refusal(tmp_path / "x.safetensors", describing(good, arguments))


def test_negative_slopes_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """The shape of no weight tells them, so the file fits the network that it describes."""
    path = tmp_path / "x.safetensors"
    save_model(create_model("mlp", widths=(4,)), path)
    assert load_model(path)
    refusal(path, describing(path.read_bytes(), {"widths": [4], "negative_slope": "steep"}, "mlp"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_weights_of_other_kinds_of_numbers_are_used_or_refused(good: bytes, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(good)
    tensors = {name: values.to(dtype) for name, values in load_model(path).state_dict().items()}
    save_file(tensors, path, {"model": "convnet", "model_args": json.dumps(TINY_CONVNET)})
    if dtype == torch.float8_e4m3fn:
        assert next(load_model(path).parameters()).dtype == torch.float32
    else:
        refusal(path, path.read_bytes())


def hang(path: Path) -> None:
    os.mkfifo(path)


def never_end(path: Path) -> None:
    path.symlink_to("/dev/zero")


def be_a_folder(path: Path) -> None:
    path.mkdir()


PLACES = (hang, never_end, be_a_folder)


@pytest.mark.parametrize("make", PLACES)
def test_weights_that_are_no_file_are_refused_unread(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="no file"):
        load_model(tmp_path / "x.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a finished run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with one run on synthetic pictures, mlp-s0, measured; tests work on copies."""
    results_dir = tmp_path_factory.mktemp("finished")
    assert train_tiny(results_dir, "--train-on-all", "--epochs", "1") == 0
    assert exit_status(lambda: evaluate.main(["mlp-s0", "--results-dir", str(results_dir)])) == 0
    return results_dir


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """The folder of that run, a copy."""
    return shutil.copytree(finished / "mlp-s0", tmp_path / "results" / "mlp-s0")


def evaluate_run(run: Path) -> int:
    return exit_status(lambda: evaluate.main([run.name, "--results-dir", str(run.parent)]))


def assert_refused(run: Path, file: str, status: int, before: dict[Path, bytes],
                   capsys: pytest.CaptureFixture[str]) -> None:
    assert status == 2
    assert str(run / file) in error_line(capsys)
    assert contents(run) == before


NO_JSON = (b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{}", b"\x00", b"\x80\x02.")
WRONG_JSON = (b"null", b"true", b"[]", b"{}", b'"\\ud800"', b"1e400", b"NaN", b'[{"settings": {}}]',
              b'{"settings": [], "command": "", "git_changes": false}')


@pytest.mark.parametrize("file", ["config.json", "result.json"])
@pytest.mark.parametrize("content", [*NO_JSON, *WRONG_JSON], ids=range(17))
def test_a_runs_json_that_says_nothing_of_use_is_refused(
    own: Path, file: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / file).write_bytes(content)
    before = contents(own)
    assert_refused(own, file, evaluate_run(own), before, capsys)


@pytest.mark.parametrize(("file", "name", "value"), [
    *(("settings", "synthetic", value) for value in ("no", 1, None, [])),
    *(("settings", "recipe", value) for value in (3, None, "\ud800", "\x1b[31m")),
    *(("settings", "seed", value) for value in ("0", 1e400, -1, True, [])),
    *(("settings", "train_on_all", value) for value in ("yes", 0)),
    *(("result", "parameters", value) for value in ("many", None, 1e400, 10**400, -1, [])),
    *(("result", "train_seconds", value) for value in ("long", float("nan"), 1e400, 10**400)),
    *(("result", "machine", value) for value in ("fast", None, [1])),
])
def test_a_runs_json_with_an_impossible_value_is_refused(
    own: Path, file: str, name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own / ("config.json" if file == "settings" else "result.json")
    content = read_json(path)
    (content["settings"] if file == "settings" else content)[name] = value
    path.write_text(json.dumps(content))
    before = contents(own)
    assert_refused(own, path.name, evaluate_run(own), before, capsys)


@pytest.mark.parametrize("recipe", ["../../outside", "..", "", "a/b", "/outside"])
def test_a_recipe_that_is_a_path_is_not_published_there(own: Path, recipe: str) -> None:
    config = read_json(own / "config.json")
    config |= {"command": "python train_mlp.py --train-on-all --seed 0", "git_changes": False}
    config["settings"] |= {"synthetic": False, "recipe": recipe}
    (own / "config.json").write_text(json.dumps(config))
    before = contents(own.parents[1])
    with pytest.raises(UserError, match="impossible recipe"):
        publish("mlp-s0", own.parent, TestPictures("", synthetic=True))
    assert contents(own.parents[1]) == before


@pytest.mark.parametrize("file", ["config.json", "result.json", "predictions.npz", "model.safetensors"])
@pytest.mark.parametrize("make", PLACES)
def test_a_runs_file_that_is_no_file_is_refused_unread(
    own: Path, file: str, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    (own / file).unlink()
    make(own / file)
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


@pytest.mark.parametrize("content", [
    b"test_hash\n" + 300_000 * b"f", b"\xff\xfe\n1\n", b'test_hash\n"' + 200_000 * b"f", b"test_hash\nzz\n", b"a\n1\n",
], ids=range(5))
def test_a_hostile_list_of_near_duplicates_is_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.runs, "load_test_set", lambda *_, **__: load_test_set("", use_synthetic=True))
    path = tmp_path / "near_duplicates.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"near_duplicates\.csv"):
        TestPictures("", near_duplicates=path)


def npz(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def write_zeros(archive: zipfile.ZipFile, name: str, size: int, begin: bytes = b"") -> None:
    """Add a record with so many bytes of zeros, which take a thousandth of that."""
    record = zipfile.ZipInfo(name)
    record.compress_type, record._compresslevel = zipfile.ZIP_DEFLATED, 1  # fast
    with archive.open(record, "w", force_zip64=True) as file:
        file.write(begin)
        for _ in range(size // 10**7):
            file.write(bytes(10**7))


def bombed_npz(shape: tuple[int, ...], real: int) -> bytes:
    """Predictions whose logits have this shape by their header, of which so many bytes of zeros are there, deflated."""
    content, header = io.BytesIO(npz(hash=np.zeros(1, np.uint64), weights_sha256=np.array(""))), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(content, "a") as archive:
        write_zeros(archive, "logits.npy", real, begin=header.getvalue())
    return content.getvalue()


def kept(run: Path) -> dict[str, Any]:
    with np.load(run / "predictions.npz") as file:
        return dict(file)


def repacked(kept: dict[str, Any]) -> bytes:
    """The arrays as bzip2 packs them, which may unpack to gigabytes at once."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(npz(**kept))) as one, zipfile.ZipFile(content, "w", zipfile.ZIP_BZIP2) as other:
        for name in one.namelist():
            other.writestr(name, one.read(name))
    return content.getvalue()


HOSTILE_PREDICTIONS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "empty": lambda kept: b"",
    "text": lambda kept: b"hello",
    "truncated": lambda kept: npz(**kept)[:-200],
    "packed by another method": repacked,
    "an array alone": lambda kept: b"\x93NUMPY\x01\x00" + 200 * b" ",
    "no logits": lambda kept: npz(**{**kept, "logits": np.zeros(0)}),
    "an array missing": lambda kept: npz(hash=kept["hash"]),
    "wrong class count": lambda kept: npz(**{**kept, "logits": kept["logits"][:, :10]}),
    "pictures missing": lambda kept: npz(**{**kept, "logits": kept["logits"][:-1]}),
    "of one dimension": lambda kept: npz(**{**kept, "logits": kept["logits"].ravel()}),
    "of no dimension": lambda kept: npz(**{**kept, "logits": np.float16(1), "hash": np.uint64(1)}),
    "other numbers": lambda kept: npz(**{**kept, "logits": kept["logits"].astype(complex)}),
    "text for numbers": lambda kept: npz(**{**kept, "logits": kept["logits"].astype(str)}),
    "not finite": lambda kept: npz(**{**kept, "logits": np.full_like(kept["logits"], np.nan)}),
    "other hashes": lambda kept: npz(**{**kept, "hash": kept["hash"][::-1]}),
    "a shape that is not there": lambda kept: bombed_npz((10**12, 100), 10**7),
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


def test_a_flipped_bit_of_predictions_is_refused_or_changes_nothing(own: Path) -> None:
    """Each array has a checksum in its archive; what has none, as dates in it, is of no use either."""
    test = TestPictures("", synthetic=True)
    logits, path = FinishedRun(own).logits(test), own / "predictions.npz"
    for damaged in bit_flips(path.read_bytes(), 50):
        path.write_bytes(damaged)
        try:
            assert np.array_equal(FinishedRun(own).logits(test), logits)
        except UserError as problem:
            assert str(path) in str(problem)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02.", struct.pack("<Q", 2**63)], ids=range(4))
def test_a_finished_run_with_hostile_weights_is_refused(
    own: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "model.safetensors").write_bytes(content)
    before = contents(own)
    assert_refused(own, "model.safetensors", evaluate_run(own), before, capsys)


def test_a_finished_run_of_another_class_count_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(create_model("mlp", widths=(8,), num_classes=10), own / "model.safetensors")
    before = contents(own)
    assert_refused(own, "model.safetensors", evaluate_run(own), before, capsys)


def test_weights_are_never_unpickled(own: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = io.BytesIO()
    torch.save(Bomb(trace), saved)
    for content in (pickle.dumps(Bomb(trace)), saved.getvalue()):
        (own / "model.safetensors").write_bytes(content)
        before = contents(own)
        assert_refused(own, "model.safetensors", evaluate_run(own), before, capsys)


@pytest.mark.parametrize("content", [
    *NO_JSON, *WRONG_JSON, b"[1]", b'[{"recipe": "mlp"}]', b'[{"top1": 3}]', b'[{"top1": {"mean": "x"}}]',
    b'[{"top1": {"mean": 1}, "recipe": "mlp", "seeds": 3}]', b'[{"top1": {"mean": 1e400}}]',
], ids=range(23))
def test_a_hostile_table_of_results_is_one_line_where_the_best_run_is_looked_for(
    own: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (own.parent / "results.json").write_bytes(content)
    assert exit_status(lambda: predict.main(["x.png", "--results-dir", str(own.parent)])) == 2
    assert "--model" in (line := error_line(capsys)) or "results.json" in line


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, and the settings beside them
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a run, mlp-s0, that was stopped after three steps; tests work on copies."""
    results_dir = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert train_tiny(results_dir, "--epochs", "1") == 130
    return results_dir


@pytest.fixture
def stopped(interrupted: Path, tmp_path: Path) -> Path:
    """The folder of that run, a copy."""
    return shutil.copytree(interrupted / "mlp-s0", tmp_path / "results" / "mlp-s0")


def load_state(run: Path) -> Any:
    """What the run's checkpoint gives back."""
    settings = train_mlp.MLPSettings.from_config(read_json(run / "config.json")["settings"])
    with Run(run, settings) as opened:
        return opened.load_checkpoint()


def same(one: Any, other: Any) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def rewritten(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The checkpoint with something else in it, whole and with fitting checksums."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    change(state)
    saved = io.BytesIO()
    torch.save(state, saved)
    return saved.getvalue()


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint of this pickle."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, record in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", record)
    return content.getvalue()


def deflated(size: int) -> bytes:
    """A checkpoint of a storage of so many bytes of zeros, compressed."""
    content = io.BytesIO(zipped(pickle.dumps({"settings": {}}, 2)))
    with zipfile.ZipFile(content, "a") as archive:
        write_zeros(archive, "archive/data/0", size)
    return content.getvalue()


def calling(module: str, name: str, argument: int) -> bytes:
    """A pickle that calls a function with a number."""
    return f"c{module}\n{name}\n".encode() + b"\x8a\x06" + argument.to_bytes(6, "little") + b"\x85R"


def allocating(size: int) -> bytes:
    """A pickle, allowed by `weights_only`, of a dictionary with so many bytes in it."""
    return b"\x80\x02}X\x08\x00\x00\x00settings" + calling("builtins", "bytearray", size) + b"s."


def first_weight(state: dict[str, Any]) -> str:
    return next(name for name in state["model"] if name.endswith("weight"))


def reshape_a_weight(state: dict[str, Any]) -> None:
    state["model"][first_weight(state)] = torch.zeros(3, 3)


def expand_a_weight(state: dict[str, Any]) -> None:
    state["model"][first_weight(state)] = torch.zeros(1, dtype=torch.float64).expand(10**6, 10**6)


def reshape_the_optimizers_memory(state: dict[str, Any]) -> None:
    for kept_of_it in state["optimizers"][0]["state"].values():
        kept_of_it["exp_avg"] = torch.zeros(3, 3)


def expand_the_optimizers_memory(state: dict[str, Any]) -> None:
    for kept_of_it in state["optimizers"][0]["state"].values():
        kept_of_it["exp_avg"] = torch.zeros(1, dtype=torch.float64).expand(10**6, 10**6)


def change_the_class_count(state: dict[str, Any]) -> None:
    state["model"] |= {name: values[:10] for name, values in state["model"].items() if name.startswith("head")}


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "wrong shape": reshape_a_weight,
    "a shape that takes 8 TB": expand_a_weight,
    "wrong shape in the optimizer": reshape_the_optimizers_memory,
    "an optimizer's state that takes 8 TB": expand_the_optimizers_memory,
    "wrong class count": change_the_class_count,
    "other settings": lambda state: state["settings"].update(lr=0.5),
    "settings of another type": lambda state: state.update(settings=[]),
    "no settings": lambda state: state.pop("settings"),
    "no weights": lambda state: state.pop("model"),
    "weights of another type": lambda state: state.update(model=[1]),
    "no optimizers": lambda state: state.update(optimizers=[]),
    "optimizers of another type": lambda state: state.update(optimizers=[3]),
    "no progress": lambda state: state.update(progress={}),
    "progress of another type": lambda state: state.update(progress=3),
    "an epoch that is no number": lambda state: state["progress"].update(epoch="third"),
    "an epoch below zero": lambda state: state["progress"].update(epoch=-1),
    "an epoch beyond the last": lambda state: state["progress"].update(epoch=10**9),
    "a step that is no number": lambda state: state["progress"].update(step=None),
    "a step beyond the last": lambda state: state["progress"].update(step=10**9),
    "rows that are none": lambda state: state["progress"].update(rows=[1]),
    "a loss of another shape": lambda state: state["progress"].update(loss=torch.zeros(3)),
    "a loss that is no tensor": lambda state: state["progress"].update(loss="small"),
}
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "text": lambda good: b"not a checkpoint\n",
    "half": lambda good: good[:len(good) // 2],
    "cut short": lambda good: good[:-10],
    "begins with something else": lambda good: pickle.dumps({"settings": {}}, 2) + good,
    "an empty archive": lambda good: b"PK\x05\x06" + bytes(18),
    "a bare dictionary": lambda good: zipped(pickle.dumps({"settings": {}}, 2)),
    "a list": lambda good: zipped(pickle.dumps([1], 2)),
    "of an older PyTorch": lambda good: legacy({"settings": {}}),
    "compressed": lambda good: zipped(pickle.dumps({"settings": {}}, 2), zipfile.ZIP_DEFLATED),
    "deeply nested": lambda good: zipped(b"\x80\x02" + 10**5 * b"]" + (10**5 - 1) * b"a" + b"."),
    **{name: lambda good, change=change: rewritten(good, change) for name, change in CHANGES.items()},
}


def legacy(state: Any) -> bytes:
    saved = io.BytesIO()
    torch.save(state, saved, _use_new_zipfile_serialization=False)
    return saved.getvalue()


@pytest.mark.parametrize("make", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_hostile_checkpoint_is_refused(
    stopped: Path, make: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped / "checkpoint.pt"
    path.write_bytes(make(path.read_bytes()))
    before = contents(stopped)
    assert_refused(stopped, "checkpoint.pt", resume(stopped.parent, "mlp-s0"), before, capsys)


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(stopped: Path) -> None:
    path = stopped / "checkpoint.pt"
    good, outcomes = load_state(stopped), set()
    for damaged in bit_flips(path.read_bytes(), 50):
        path.write_bytes(damaged)
        try:
            assert same(load_state(stopped), good)
            outcomes.add("the same")
        except UserError as problem:
            assert str(path) in str(problem)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_checkpoints_execute_nothing(stopped: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (pickle.dumps(Bomb(trace), 2), zipped(pickle.dumps(Bomb(trace), 2)), legacy(Bomb(trace)),
                    zipped(pickle.dumps({"settings": {}, "model": Bomb(trace)}, 2))):
        (stopped / "checkpoint.pt").write_bytes(content)
        before = contents(stopped)
        assert_refused(stopped, "checkpoint.pt", resume(stopped.parent, "mlp-s0"), before, capsys)


@pytest.mark.parametrize("make", PLACES)
def test_a_checkpoint_that_is_no_file_is_refused_unread(
    stopped: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / "checkpoint.pt").unlink()
    make(stopped / "checkpoint.pt")
    before = contents(stopped)
    assert_refused(stopped, "checkpoint.pt", resume(stopped.parent, "mlp-s0"), before, capsys)


@pytest.mark.parametrize("content", [*NO_JSON, *WRONG_JSON], ids=range(17))
def test_hostile_settings_are_not_resumed(
    stopped: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / "config.json").write_bytes(content)
    before = contents(stopped)
    assert resume(stopped.parent, "mlp-s0") == 2
    assert "config.json" in error_line(capsys)
    assert contents(stopped) == before


@pytest.mark.parametrize(("name", "value"), [
    ("epochs", "1"), ("epochs", 1e400), ("epochs", True), ("epochs", 10**12), ("batch_size", -5), ("widths", "8"),
    ("widths", ["8"]), ("widths", [[8]]), ("widths", [10**9]), ("widths", [8] * 10**6), ("widths", []),
    ("lr", float("nan")), ("lr", "0.1"), ("lr", 10**400), ("seed", -1), ("seed", 1.5), ("data_dir", 3),
    ("optimizer", "os.system"), ("recipe", 3), ("synthetic", "yes"), ("side", 10**9),
    ("unknown", 1),
])
def test_impossible_settings_are_not_resumed(
    stopped: Path, name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_json(stopped / "config.json")
    config["settings"][name] = value
    (stopped / "config.json").write_text(json.dumps(config))
    before = contents(stopped)
    assert resume(stopped.parent, "mlp-s0") == 2
    error_line(capsys)
    assert contents(stopped) == before


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def zeros(size: int) -> bytes:
    """So many bytes of zeros, deflated."""
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(bytes(10**7)) for _ in range(size // 10**7)), packer.flush()])


def png(width: int, height: int, kind: bytes, content: bytes) -> bytes:
    """An RGBA picture of this size by its header, with one chunk of this kind."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(kind, content) + chunk(b"IEND", b"")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
def test_bombs_take_little_memory(finished: Path, interrupted: Path, good: bytes, tmp_path: Path) -> None:
    """Every kind of file that could ask for gigabytes, by its scripts, in one process whose memory is measured."""
    commands: list[tuple[str | Path, ...]] = []

    def resuming(content: bytes) -> None:
        folder = tmp_path / f"results{len(commands)}"
        shutil.copytree(interrupted, folder)
        (folder / "mlp-s0" / "checkpoint.pt").write_bytes(content)
        commands.append(("train_mlp", "--resume", "mlp-s0", "--results-dir", folder))

    def evaluating(file: str, content: bytes) -> None:
        folder = tmp_path / f"results{len(commands)}"
        shutil.copytree(finished, folder)
        (folder / "mlp-s0" / file).write_bytes(content)
        commands.append(("evaluate", "mlp-s0", "--results-dir", folder))

    for content in (deflated(HUGE), zipped(allocating(HUGE)), zipped(allocating(10**12)),
                    zipped(b"\x80\x02" + calling("torch.storage", "UntypedStorage", HUGE) + b"."),
                    allocating(HUGE) + zipped(pickle.dumps({"settings": {}}, 2))):
        resuming(content)
    evaluating("predictions.npz", bombed_npz((HUGE // 200, 100), HUGE))
    evaluating("predictions.npz", bombed_npz((10**12, 100), 10**7))
    evaluating("model.safetensors", describing(good, {**TINY_CONVNET, "side": 10**9}))
    evaluating("model.safetensors", describing(good, {"widths": [4], "blocks": [10**9]}))
    evaluating("model.safetensors", with_header((10**8 - 2) * b" " + b"{}"))
    of_files = len(commands)
    (tmp_path / "good.safetensors").write_bytes(good)
    for number, picture in enumerate((
            png(30_000, 30_000, b"IDAT", zeros(HUGE)), png(8, 8, b"zTXt", b"a\0\0" + zeros(HUGE)),
            png(8000, 8000, b"IDAT", zeros(HUGE // 10)))):
        (tmp_path / f"{number}.png").write_bytes(picture)
        commands.append(("predict", tmp_path / f"{number}.png", "--model", tmp_path / "good.safetensors"))
    statuses, lines, peak = in_a_process(*commands)
    assert statuses == [2] * of_files + [1] * (len(commands) - of_files)
    assert len(lines) == len(commands) and all(line.startswith("error: ") for line in lines), lines
    assert peak < BOUND


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_a_picture_with_a_flipped_bit_is_read_or_refused_in_silence(
    suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"x.{suffix}")
    for damaged in bit_flips((tmp_path / f"x.{suffix}").read_bytes(), 50):
        (tmp_path / f"y.{suffix}").write_bytes(damaged)
        try:
            picture = read_picture(tmp_path / f"y.{suffix}")
            assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8
        except UserError as problem:
            assert str(problem).startswith(str(tmp_path)) and "\n" not in str(problem)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# What the sources may do
# ---------------------------------------------------------------------------------------------------------------------

UNSAFE_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve",
                  "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "torch.hub.load",
                "pandas.read_pickle", "np.fromregex", "subprocess.getoutput", "subprocess.getstatusoutput"}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What of a module could execute something that stands in a file."""
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
def test_what_is_unsafe_is_found(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_executes_what_a_file_says(path: Path) -> None:
    assert list(unsafe(ast.parse(path.read_text(encoding="utf-8")))) == []
