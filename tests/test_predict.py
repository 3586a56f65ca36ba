"""Classifying images of any kind, refusing other files, finding the weights, and exporting a network."""

import codecs
import json
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import save
from torch import Tensor

import predict
from common import devices
from common.command_line import exit_status
from common.errors import UserError
from common.text import degrade
from evaluation.images import SURE, find_images
from models import create_model, labeled, load_model, save_model
from predict import classify, find_weights, quiet_decoders, read_image
from tests.helpers import ROOT, error_line
from training.checkpoint import Progress, checkpoint_bytes
from utils import COARSE_NAMES, COARSE_OF_FINE, FINE_NAMES, compute_logits, to_float

RED, BLUE = (250, 10, 20), (10, 30, 240)


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with two published recipes, the better one with weights for seed 1 only, and own runs."""
    folder = tmp_path_factory.mktemp("results")
    for seed, run in enumerate(("published/good-s0", "published/good-s1", "published/poor-s0", "mine", "drawn")):
        torch.manual_seed(seed)
        (folder / run).mkdir(parents=True)
        config = {"settings": {"synthetic": run == "drawn"}, "command": "", "git_changes": False}
        (folder / run / "config.json").write_text(json.dumps(config))
        (folder / run / "result.json").write_text("{}")
        if run != "published/good-s0":
            save_model(create_model("mlp", widths=(8,)), folder / run / "model.safetensors")
    (folder / "stopped").mkdir()
    config = {"settings": {}, "command": "python train_mlp.py --seed 0", "git_changes": False}
    (folder / "stopped" / "config.json").write_text(json.dumps(config))
    rows = [{"recipe": "poor", "seeds": [0], "top1": {"mean": 20.0}},
            {"recipe": "good", "seeds": [0, 1], "top1": {"mean": 30.0}}]
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def halves() -> Image.Image:
    """64 x 64 pixels: red above blue."""
    image = Image.new("RGB", (64, 64), RED)
    image.paste(BLUE, (0, 32, 64, 64))
    return image


def run(results_dir: Path, *words: str | Path) -> int:
    return exit_status(lambda: predict.main([*map(str, words), "--results-dir", str(results_dir)]))


def run_json(results_dir: Path, capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, list]:
    status = run(results_dir, *words, "--json")
    return status, json.loads(capsys.readouterr().out)


def color(image: Tensor, row: int, column: int) -> tuple[int, ...]:
    return tuple(image[:, row, column].tolist())


def near(a: tuple[int, ...], b: tuple[int, ...], within: int = 12) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= within


# ---- Reading images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif", "ppm"])
def test_an_image_is_the_same_in_every_format(tmp_path: Path, halves: Image.Image, suffix: str) -> None:
    halves.save(tmp_path / f"x.{suffix}")
    image = read_image(tmp_path / f"x.{suffix}")
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)
    assert near(color(image, 4, 4), RED) and near(color(image, 28, 28), BLUE)


def test_transparent_pixels_become_white(tmp_path: Path, halves: Image.Image) -> None:
    alpha = Image.new("L", halves.size, 255)
    alpha.paste(0, (0, 0, 64, 32))
    halves.putalpha(alpha)
    halves.save(tmp_path / "rgba.png")
    halves.save(tmp_path / "palette.gif")
    board = np.where(np.indices((64, 64)).sum(0)[..., None] % 2, np.uint8(RED), np.uint8(BLUE))
    Image.fromarray(board).save(tmp_path / "keyed.png", transparency=RED)  # every second pixel
    for file in ("rgba.png", "palette.gif"):
        assert color(read_image(tmp_path / file), 4, 4) == (255, 255, 255), file
        assert near(color(read_image(tmp_path / file), 28, 4), BLUE), file
    assert near(color(read_image(tmp_path / "keyed.png"), 9, 9), tuple((255 + level) // 2 for level in BLUE))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(
    tmp_path: Path, halves: Image.Image, orientation: int, suffix: str
) -> None:
    """The image is stored turned by the inverse of its EXIF orientation, in a frame that is not square."""
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    upright = Image.new("RGB", (100, 64), "green")  # green on both sides of the center square
    upright.paste(halves, (18, 0))
    upright.paste("white", (18, 0, 50, 32))
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{suffix}", exif=exif)
    image = read_image(tmp_path / f"x.{suffix}")
    corners = [color(image, row, column) for row in (4, 28) for column in (4, 28)]
    for found, expected in zip(corners, ((255, 255, 255), RED, BLUE, BLUE), strict=True):
        assert near(found, expected, within=25)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3, 2), (31, 33), (4000, 3000)])
def test_images_of_any_size_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    for suffix in ("png", "jpg"):
        Image.new("RGB", size, BLUE).save(tmp_path / f"x.{suffix}")
        image = read_image(tmp_path / f"x.{suffix}")
        assert image.shape == (3, 32, 32)
        assert near(color(image, 0, 0), BLUE) and near(color(image, 31, 31), BLUE)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_images_are_scaled_down_with_antialiasing(tmp_path: Path, mode: str) -> None:
    """A checkerboard of single pixels becomes gray; without antialiasing, black, white or stripes."""
    board = np.uint8(255 * (np.indices((320, 320)).sum(0) % 2))
    Image.fromarray(board).convert(mode).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert int(image.min()) >= 120 and int(image.max()) <= 135


def test_an_image_of_32_pixels_is_unchanged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png").permute(1, 2, 0).numpy(), pixels)


def test_an_animation_is_read_as_its_first_frame(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), RED).save(tmp_path / "x.gif", save_all=True,
                                         append_images=[Image.new("RGB", (40, 40), BLUE)])
    assert near(color(read_image(tmp_path / "x.gif"), 9, 9), RED)


def process_state() -> tuple[object, ...]:
    """Everything of the process that reading an image could change: filters, levels, and where stderr leads."""
    stderr = os.fstat(2)
    return (list(warnings.filters), logging.getLogger("PIL").level, Image.MAX_IMAGE_PIXELS,
            ImageFile.LOAD_TRUNCATED_IMAGES, sys.stderr, (stderr.st_dev, stderr.st_ino))


@pytest.mark.parametrize("content", ["good", "damaged", "huge"])
def test_threads_that_read_images_leave_the_process_alone(tmp_path: Path, halves: Image.Image, content: str) -> None:
    halves.save(tmp_path / "x.tif", compression="tiff_lzw")
    if content == "damaged":
        (tmp_path / "x.tif").write_bytes((tmp_path / "x.tif").read_bytes()[:-60])
    elif content == "huge":
        (tmp_path / "x.tif").write_bytes(bomb(12_000, 12_000))
    before, wrong, done = process_state(), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            wrong.extend([state for state in [process_state()] if state != before])

    def read(number: int) -> str:
        try:
            return str(read_image(tmp_path / "x.tif").sum())
        except UserError as problem:
            return str(problem)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        outcomes = set(pool.map(read, range(40)))
    done.set()
    watcher.join()
    assert len(outcomes) == 1 and wrong == [] and process_state() == before


def test_predict_silences_decoders_only_while_it_reads(capfd: pytest.CaptureFixture[str]) -> None:
    before = process_state()
    with quiet_decoders():
        os.write(2, b"libtiff\n")
        warnings.warn("Pillow", stacklevel=1)
        logging.getLogger("PIL.x").error("Pillow")
    os.write(2, b"us\n")
    assert capfd.readouterr().err == "us\n" and process_state() == before


# ---- Predictions ----------------------------------------------------------------------------------------------------


def test_five_guesses_are_printed_most_probable_first(
    results_dir: Path, tmp_path: Path, halves: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    halves.save(tmp_path / "x.png")
    assert run(results_dir, tmp_path / "x.png") == 0
    model, file, not_sure, *guesses = capsys.readouterr().out.splitlines()
    assert "good-s1" in model and file == str(tmp_path / "x.png") and len(guesses) == 5
    assert not_sure == "  not sure: the first guess is below 50%"  # the network is not trained
    status, (answer,) = run_json(results_dir, capsys, tmp_path / "x.png")
    assert status == 0 and answer.keys() == {"file", "sure", "guesses"} and answer["sure"] is False
    probabilities = [guess["probability"] for guess in answer["guesses"]]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1
    for line, guess in zip(guesses, answer["guesses"], strict=True):
        assert guess["superclass"] == COARSE_NAMES[COARSE_OF_FINE[FINE_NAMES.index(guess["class"])]]
        assert line.split("  ")[-1].split() == guess["superclass"].replace("_", " ").split() and "_" not in line
        assert f" {guess['class'].replace('_', ' ')} " in line
        assert line.split()[0] == f"{guess['probability']:.1%}"


def test_probabilities_are_the_softmax_of_the_logits() -> None:
    torch.manual_seed(0)
    model, image = create_model("mlp", widths=(8,)).eval(), torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(image[None] / 255)[0].softmax(0)
    guesses = classify(model, image, count=100)
    assert [guess.name for guess in guesses] == [FINE_NAMES[fine] for fine in expected.argsort(descending=True)]
    torch.testing.assert_close(torch.tensor([guess.probability for guess in guesses]), expected.sort().values.flip(0))


def test_a_temperature_divides_the_logits_and_keeps_the_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, image = create_model("mlp", widths=(8,)).eval(), torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    save_model(model, tmp_path / "x.safetensors")
    before = classify(load_model(tmp_path / "x.safetensors"), image, count=100)
    (tmp_path / "x.safetensors").write_bytes(labeled(tmp_path / "x.safetensors", temperature=0.25))
    after = classify(load_model(tmp_path / "x.safetensors"), image, count=100)
    powers = [guess.probability ** 4 for guess in before]
    assert [guess.probability for guess in after] == pytest.approx([power / sum(powers) for power in powers])
    assert [guess.name for guess in after] == [guess.name for guess in before]


def test_below_half_the_answer_is_not_sure_and_says_if_calibrated(
    results_dir: Path, tmp_path: Path, halves: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    halves.save(tmp_path / "x.png")
    path = shutil.copy(results_dir / "mine" / "model.safetensors", tmp_path / "x.safetensors")
    for temperature, sure in ((0.002, True), (5.0, False)):
        path.write_bytes(labeled(path, temperature=temperature))
        _, (answer,) = run_json(results_dir, capsys, tmp_path / "x.png", "--model", path)
        assert answer["sure"] is sure is (answer["guesses"][0]["probability"] >= SURE)
        assert run(results_dir, tmp_path / "x.png", "--model", path) == 0
        text = capsys.readouterr().out
        assert ("not sure: the first guess is below 50%" in text) is not sure
        assert "not calibrated" not in text
    assert f"below\n{SURE:.0%}" in predict.__doc__ and f"below {SURE:.0%}" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16", "F"])
def test_squeezing_keeps_what_cropping_cuts_off(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    image = Image.new("RGB", size, "white")
    image.paste("black", (0, 0, size[0] // 3, size[1]) if size[0] > size[1] else (0, 0, size[0], size[1] // 3))
    image = image.convert("L").convert("I").point(lambda level: level * 257).convert(mode) if mode == "I;16" \
        else image.convert("L").convert(mode) if mode == "F" else image.convert(mode)
    image.save(tmp_path / "x.tif")
    cropped, squeezed = read_image(tmp_path / "x.tif"), read_image(tmp_path / "x.tif", squeeze=True)
    assert cropped.float().mean() > 245 or mode == "F"
    dark = squeezed[:, :, :9] if size[0] > size[1] else squeezed[:, :9]
    light = squeezed[:, :, 13:] if size[0] > size[1] else squeezed[:, 13:]
    assert int(dark.max()) < 10 and int(light.min()) > 245


def test_a_squeezed_photograph_is_upright(tmp_path: Path, halves: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    halves.resize((64, 200)).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.jpg", exif=exif)
    image = read_image(tmp_path / "x.jpg", squeeze=True)
    assert near(color(image, 4, 16), RED, within=25) and near(color(image, 28, 16), BLUE, within=25)


def test_show_writes_the_pixels_that_the_network_saw(
    results_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(noise).save(tmp_path / "elsewhere" / "cat.png")
    monkeypatch.chdir(tmp_path)
    for flags, name in (((), "cat-32x32.png"), (("--squeeze",), "cat-squeezed-32x32.png")):
        assert run(results_dir, "elsewhere/cat.png", "--show", *flags) == 0
        assert f"\n  the network saw {name}\n" in capsys.readouterr().out
        with Image.open(name) as image:
            shown = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(shown, read_image("elsewhere/cat.png", squeeze=bool(flags)))
        assert torch.equal(shown, read_image(name))  # so it can be classified itself
    _, (answer,) = run_json(results_dir, capsys, "elsewhere/cat.png", "--show")  # the same pixels again
    assert answer["shown"] == "cat-32x32.png"


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_show_replaces_nothing(
    results_dir: Path, tmp_path: Path, halves: Image.Image, kind: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    halves.save("x.png")
    target = tmp_path / "x-32x32.png"
    if kind == "file":
        target.write_bytes(b"precious")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    assert run(results_dir, "x.png", "--show") == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: x-32x32.png exists and is another file: move it away")
    assert "%" in printed.out and "the network saw" not in printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-32x32.png", "x.png"]
    assert kind != "file" or target.read_bytes() == b"precious"


@pytest.mark.parametrize(("image", "words"), [
    (torch.rand(3, 32, 32), "float32 [3, 32, 32]"), (torch.ones(3, 32, 32, dtype=torch.int64), "int64 [3, 32, 32]"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8 [1, 3, 32, 32]"),
    (torch.zeros(32, 32, 3, dtype=torch.uint8), "uint8 [32, 32, 3]"),
    (torch.zeros(3, 64, 64, dtype=torch.uint8), "uint8 [3, 64, 64]"),
    (np.zeros((3, 32, 32), np.uint8), "not ndarray"), (Image.new("RGB", (32, 32)), "not Image"), (None, "not NoneType"),
])
def test_what_is_not_an_image_is_refused_and_unchanged(image: object, words: str) -> None:
    before = image.clone() if isinstance(image, Tensor) else None
    with pytest.raises(UserError) as problem:
        classify(create_model("mlp", widths=(8,)), image)
    assert words in str(problem.value) and "\n" not in str(problem.value)
    assert before is None or torch.equal(image, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_only_bytes_become_floats_and_no_argument_is_written_to(dtype: torch.dtype) -> None:
    levels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    images, before = levels.to(dtype), levels.clone()
    for convert in (to_float, lambda images: compute_logits(create_model("mlp", widths=(8,)), images)):
        with pytest.raises(TypeError, match=f"must be uint8, not {str(dtype)[6:]}"):
            convert(images)
        convert(levels)
    assert torch.equal(images, before.to(dtype)) and torch.equal(levels, before)
    assert torch.equal(to_float(levels), levels.float() / 255)


def test_files_of_a_folder_that_are_left_out_are_counted(
    results_dir: Path, tmp_path: Path, halves: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    (folder / "inside").mkdir(parents=True)
    for name in ("a.HEIC", "b.heic", "c.mpg", "d.h5", "e.eps", "f.wmf", "nosuffix", ".hidden.heic", "g\x1b[31m.x\ny"):
        (folder / name).write_bytes(b"content")
    halves.save(folder / "x.png")
    assert run(results_dir, folder) == 0
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"warning: {folder}: skipped ") and "2 .heic" in line and "\x1b" not in line
    assert all(f"1 {kind}" in line for kind in (".mpg", ".h5", ".eps", ".wmf", "without a suffix", "subfolder"))
    assert len(captured.out.splitlines()) == 8
    (folder / "x.png").unlink()
    status, (answer,) = run_json(results_dir, capsys, folder)
    assert status == 1 and "contains no images: skipped" in answer["error"] and "2 .heic" in answer["error"]


def test_a_folder_of_many_formats_is_one_short_warning(
    results_dir: Path, tmp_path: Path, halves: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(300):
        (tmp_path / f"x.{number}").write_text("")
    halves.save(tmp_path / "x.mpo", format="JPEG")
    assert run(results_dir, tmp_path) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "skipped 300 files" in line and "290 other)" in line and len(line) < 400


def test_a_large_folder_is_searched_in_linear_time(tmp_path: Path) -> None:
    counted = Counter()

    class Counting(type(tmp_path)):
        def __hash__(self) -> int:
            counted["hashes"] += 1
            return super().__hash__()

    for number in range(100):
        (tmp_path / f"{number:02}.{'png' if number % 2 else 'txt'}").touch()
    files, left_out = find_images(Counting(tmp_path))
    assert [file.name for file in files] == [f"{number:02}.png" for number in range(1, 100, 2)]
    assert "50 .txt" in left_out
    assert counted["hashes"] <= 2 * 100


@pytest.mark.parametrize("suffix", ["h5", "bufr", "grib", "mpg", "eps", "heic"])
def test_a_format_that_pillow_only_recognizes_is_refused(tmp_path: Path, suffix: str) -> None:
    starts = {"h5": b"\x89HDF\r\n\x1a\n", "bufr": b"BUFR", "grib": b"GRIB\0\0\0\1", "mpg": b"\0\0\1\xb3\x02\x00\x20\0",
              "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "heic": b"\0\0\0\x18ftypheic"}
    (tmp_path / f"x.{suffix}").write_bytes(starts[suffix] + bytes(99))
    with pytest.raises(UserError, match="is not an image of a supported format: convert it to JPEG or PNG first"):
        read_image(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize(("script", "words", "plain", "never"), [
    ("predict.py", ("docs/figures/drawing.png", "--model", "published/fast-s0"), " ### ", "\\u2588"),
    ("predict.py", ("docs/figures/drawing.png", "--model", "nö"), "is called n\\", "Traceback"),
])
@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"},
                                         {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_output_without_unicode_is_plain(
    script: str, words: tuple[str, ...], plain: str, never: str, environment: dict[str, str]
) -> None:
    done = subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, timeout=60,
                          env={**os.environ, **environment})
    output = (done.stdout + done.stderr).decode("ascii")
    assert plain.strip() in output and never not in output


def test_each_symbol_has_a_plain_form() -> None:
    codecs.register_error("degrade", degrade)
    text = "70.1 ± 0.2, 69–71, ✓ 32×32 █ \udcff é 名"
    assert text.encode("ascii", "degrade") == rb"70.1 +/- 0.2, 69-71, v 32x32 # \udcff \xe9 \u540d"
    assert text.encode("cp1252", "degrade").decode("cp1252") == r"70.1 ± 0.2, 69–71, v 32×32 # \udcff é \u540d"
    assert text.encode("utf-8", "degrade").decode() == text.replace("\udcff", r"\udcff")


def test_a_folder_stands_for_the_images_in_it(
    results_dir: Path, tmp_path: Path, halves: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inside").mkdir()
    for name in ("b.png", "a.JPG", ".hidden.png", "inside/c.png"):
        halves.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "broken.png").write_bytes(b"not this either")
    status, given = run_json(results_dir, capsys, tmp_path)
    assert [Path(answer["file"]).name for answer in given] == ["a.JPG", "b.png", "broken.png"]
    assert [set(answer) - {"file"} for answer in given] == [{"sure", "guesses"}, {"sure", "guesses"}, {"error"}]
    assert status == 1


def test_a_bad_file_is_one_error_line_and_others_go_on(
    results_dir: Path, tmp_path: Path, halves: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    halves.save(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "odd\nname\x1b[31m").write_text("hello")
    for bad in ("text.png", "missing.png", "empty", "odd\nname\x1b[31m"):
        assert run(results_dir, tmp_path / bad, tmp_path / "x.png") == 1
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {tmp_path}") and captured.err.count("\n") == 1
        assert "\x1b" not in captured.err and "Traceback" not in captured.err
        assert len(captured.out.splitlines()) == 8


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, with hardly any pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) \
        + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8001, 8000), (12_000, 12_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_decoding(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "x.png").write_bytes(bomb(*size))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match="more than 64,000,000 pixels"):
        read_image(tmp_path / "x.png")
    assert len(recwarn) == 0  # Pillow's would be another line on stderr


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.webp", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(2**30)
    with pytest.raises(UserError, match="bytes"):
        read_image(tmp_path / "x.webp")


def test_postscript_is_not_executed(tmp_path: Path, halves: Image.Image) -> None:
    halves.save(tmp_path / "x.eps")
    with pytest.raises(UserError, match="not an image of a supported format"):
        read_image(tmp_path / "x.eps")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif", "ico", "jp2"])
def test_a_damaged_image_is_read_or_refused_quietly(
    tmp_path: Path, halves: Image.Image, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A truncated or changed file gives an image or one line, and under predict.py no decoder writes to stderr."""
    extra = {"compression": "tiff_lzw"} if suffix == "tif" else {}
    halves.save(tmp_path / f"x.{suffix}", **extra)
    content, generator = (tmp_path / f"x.{suffix}").read_bytes(), random.Random(suffix)
    for attempt in range(40):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 3, 20))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        if attempt % 2:
            damaged = damaged[:generator.randrange(len(damaged))]
        (tmp_path / f"y.{suffix}").write_bytes(damaged)
        try:
            with quiet_decoders():
                assert read_image(tmp_path / f"y.{suffix}").shape == (3, 32, 32)
        except UserError as problem:
            assert str(problem).startswith(f"{tmp_path}") and "\n" not in str(problem)
    assert capfd.readouterr() == ("", "")


def test_half_an_image_is_an_error(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "gif", "webp", "tif"):
        Image.fromarray(noise).save(tmp_path / f"x.{suffix}")
        content = (tmp_path / f"x.{suffix}").read_bytes()
        (tmp_path / f"x.{suffix}").write_bytes(content[:len(content) // 2])
        with pytest.raises(UserError):
            read_image(tmp_path / f"x.{suffix}")


# ---- Finding the weights --------------------------------------------------------------------------------------------


def test_the_best_published_weights_are_the_default(results_dir: Path) -> None:
    assert find_weights(None, results_dir) == results_dir / "published/good-s1/model.safetensors"


def test_weights_are_found_by_run_or_by_file(results_dir: Path) -> None:
    assert find_weights("mine", results_dir) == results_dir / "mine/model.safetensors"
    for name in ("poor-s0", "published/poor-s0"):  # none of the own runs has that name
        assert find_weights(name, results_dir) == results_dir / "published/poor-s0/model.safetensors"
    file = results_dir / "mine/model.safetensors"
    assert find_weights(str(file), results_dir) == file


@pytest.mark.parametrize("name", ["mine/", "results/mine", "results/mine/", "./results/mine", "{folder}/mine",
                                  "results/mine/model.safetensors", "mine/model.safetensors"])
def test_a_run_is_named_as_a_shell_completes_it(
    results_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "results").symlink_to(results_dir)
    monkeypatch.chdir(tmp_path)
    found = find_weights(name.format(folder=results_dir), results_dir)
    assert found.samefile(results_dir / "mine/model.safetensors")


def test_another_programs_config_does_not_matter(results_dir: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copy(results_dir / "mine/model.safetensors", tmp_path))
    for config in ({"model_type": "vit"}, {"settings": {"synthetic": True}}, ["settings"]):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert find_weights(str(weights), results_dir) == weights


@pytest.mark.parametrize(("file", "kind"), [
    ("checkpoint.safetensors", "a training checkpoint"), ("result.json", "a JSON file"), ("x.pt", "a pickle"),
    ("x.pth", "a pickle"), ("x.onnx", "an ONNX file"), ("loss.png", "a .png file"), ("metrics.csv", "a .csv file"),
    ("other.safetensors", "a safetensors file of another program"),
])
def test_a_file_that_is_not_weights_is_named_with_the_one_to_take(
    results_dir: Path, tmp_path: Path, file: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(results_dir / "mine", tmp_path / "mine") / file
    model = create_model("mlp", widths=(8,))
    if file == "checkpoint.safetensors":
        path.write_bytes(checkpoint_bytes(model, [], Progress(), {}))
    elif file == "other.safetensors":
        path.write_bytes(save({"a": torch.zeros(1)}))
    elif path.suffix in (".pt", ".pth"):
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=path.suffix == ".pt")
    elif file != "result.json":
        path.write_bytes(b"\x08\x08content" if file == "x.onnx" else b"content")
    assert run(results_dir, "x.png", "--model", path) == 2
    line = error_line(capsys)
    assert f"{path} is {kind}" in line and line.endswith(f"take {tmp_path / 'mine' / 'model.safetensors'}")
    assert run(results_dir, "x.png", "--model", line.split(" take ")[1]) == 1  # x.png is missing, and nothing else
    if kind.startswith("a ."):
        return
    (tmp_path / "mine" / "model.safetensors").unlink()
    assert run(results_dir, "x.png", "--model", path) == 2
    assert "once its run is finished" in capsys.readouterr().err
    (tmp_path / "mine" / "config.json").unlink()
    assert run(results_dir, "x.png", "--model", path) == 2
    assert "give the model.safetensors of a run" in error_line(capsys)


def test_a_home_folder_is_expanded_wherever_a_path_is_taken(
    results_dir: Path, tmp_path: Path, halves: Image.Image, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(results_dir / "mine", tmp_path / "runs" / "mine")
    halves.save(tmp_path / "x.png")
    for model in ("~/runs/mine", "~/runs/mine/model.safetensors"):
        assert run(results_dir, "~/x.png", "--model", model) == 0
    assert exit_status(lambda: predict.main(["~/x.png", "--model", "mine", "--results-dir=~/runs"])) == 0
    assert run(results_dir, "--model", "mine", "--export", "~/runs/mine/config.json") == 2  # it is not overwritten
    assert f"{tmp_path}/runs/mine/config.json exists" in capsys.readouterr().err


def test_without_a_table_a_model_must_be_named(
    results_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(results_dir / "mine", tmp_path / "mine")
    assert run(tmp_path, "x.png") == 2
    assert "name one of your runs with --model" in error_line(capsys)


def test_the_network_runs_on_the_device_that_is_asked_for(
    results_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []
    monkeypatch.setattr(predict, "load_model",
                        lambda path, device: loaded.append(device) or create_model("mlp", widths=(8,)))
    for present, flags, expected in ((("cuda",), (), "cuda"), (("mps",), (), "mps"), (("cuda", "mps"), (), "cuda"),
                                     ((), (), "cpu"), (("cuda",), ("--device", "cpu"), "cpu"),
                                     (("mps",), ("--device", "mps"), "mps")):
        for name in ("cuda", "mps"):
            module = torch.cuda if name == "cuda" else torch.backends.mps
            monkeypatch.setattr(module, "is_available", lambda there=name in present: there)
        assert run(results_dir, "x.png", "--model", "mine", *flags) == 1  # x.png is missing
        assert loaded.pop() == expected
    monkeypatch.setattr(devices, "is_available", lambda name: name == "cpu")
    capsys.readouterr()
    for name in ("cuda", "mps"):
        assert run(results_dir, "x.png", "--model", "mine", "--device", name) == 2
        assert f"has no {name} device: use --device cpu" in error_line(capsys)


@pytest.mark.parametrize(("name", "words"), [
    ("nothing", "there are: drawn, mine, published/good-s1, published/poor-s0"),
    ("published/good-s0", "has no weights; there are: drawn, mine"),  # they are not published
    ("stopped", "is not finished: unless it is still being trained, resume it with: python train_mlp.py --resume"),
    ("drawn", "synthetic images"),
    ("drawn/model.safetensors", "synthetic images"),
    ("published", "no run in"),
    ("x" * 300, "no run in"),
    ("~nobody/x", "no run in"),
    ("README.md", "cannot be read as a weights file"),
    ("ten.safetensors", "has 10 classes instead of 100"),
])
def test_unusable_weights_are_one_error_line(
    results_dir: Path, tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(create_model("mlp", widths=(8,), num_classes=10), tmp_path / "ten.safetensors")
    (tmp_path / "README.md").write_text("no weights")
    path = tmp_path / name if name in ("README.md", "ten.safetensors") else name
    assert run(results_dir, "x.png", "--model", path) == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize("words", [(), ("x.png", "--export", "y.onnx"), ("--export", "y.onnx", "--json"),
                                   ("--export", "y.onnx", "--device", "cpu"), ("x.png", "--device", "tpu"),
                                   ("--export", "y.onnx", "--show"), ("--export", "y.onnx", "--squeeze")])
def test_a_contradictory_command_is_one_error_line(
    results_dir: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(results_dir, *words) == 2
    error_line(capsys)


def test_the_published_network_recognizes_the_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    drawing = ROOT / "docs/figures/drawing.png"
    _, (answer,) = run_json(ROOT / "results", capsys, drawing, "--model", "published/fast-s0")
    assert (answer["guesses"][0]["class"], answer["guesses"][0]["superclass"]) == ("sunflower", "flowers")


# ---- Export ---------------------------------------------------------------------------------------------------------


def test_an_export_gives_the_same_logits_for_any_batch(
    results_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="the export needs onnx and onnxscript (requirements-extra.txt)")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the comparison needs onnxruntime (requirements-extra.txt)")
    torch.manual_seed(0)
    model = create_model("mirrornet", widths=(8, 16, 24), inner=(8, 8, 16)).eval()
    save_model(model, tmp_path / "x.safetensors")
    assert run(results_dir, "--model", tmp_path / "x.safetensors", "--export", tmp_path / "x.onnx") == 0
    assert "differ from PyTorch's by at most" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    model = predict.load_model(tmp_path / "x.safetensors")
    for count in (1, 5):
        images = torch.rand(count, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["classes"].split() == list(FINE_NAMES) and facts["temperature"] == "1.0"
    assert str(ROOT).encode() not in (tmp_path / "x.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.safetensors"]


def test_a_failed_export_changes_no_file(
    results_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.onnx").write_text("precious")
    assert run(results_dir, "--export", tmp_path / "x.onnx") == 2
    assert "exists" in error_line(capsys)
    assert run(results_dir, "--export", tmp_path / "nowhere/x.onnx") == 2
    assert "does not exist" in error_line(capsys)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert run(results_dir, "--export", tmp_path / "y.onnx") == 2
    assert "requirements-extra.txt" in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    assert (tmp_path / "x.onnx").read_text() == "precious"
