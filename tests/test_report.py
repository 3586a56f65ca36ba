"""The report: its file and, where chromium is installed, its behavior in a real browser.

The page under test has four images in each of three classes, each image in a single color, and two runs with
hand-made predictions. Chromium is driven through chromedriver's protocol (https://w3c.github.io/webdriver).
"""

import base64
import io
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from evaluation import report
from evaluation.finished_runs import FinishedRun
from evaluation.report import write_report

BEE = "</script><b>bee&"  # looks like markup
CLASSES = ("red_ant", BEE, "crab", "worm", "oak", "elm")  # there are images of the first three
PER_CLASS = 4
LABELS = np.tile(np.arange(3), PER_CLASS)  # not sorted by class, like the test set
COLORS = np.random.default_rng(0).integers(40, 216, (len(LABELS), 3), dtype=np.uint8)
TEST = SimpleNamespace(
    images=torch.from_numpy(COLORS).view(-1, 3, 1, 1).expand(-1, 3, 32, 32).contiguous(),
    hashes=np.arange(len(LABELS), dtype=np.uint64), fine_labels=LABELS, coarse_labels=np.array([0, 0, 1])[LABELS],
    fine_names=CLASSES, coarse_names=("insects", "sea_animals", "trees"))

CRABS = np.tile([0.1, 0.15, 0.7, 0.03, 0.015, 0.005], (len(LABELS), 1))  # a run that predicts crab for every image
GOOD = np.full((len(LABELS), len(CLASSES)), 0.08)
GOOD[np.arange(len(LABELS)), LABELS] = 0.6
GOOD[6] = 0.08, 0.9, 0.008, 0.006, 0.004, 0.002  # the third red ant: predicted as bee with confidence
GOOD[7] = 0.2, 0.06, 0.7, 0.02, 0.015, 0.005  # the third bee: predicted as crab
GOOD[9] = 0.996, 0.0015, 0.001, 0.0007, 0.0005, 0.0003  # the fourth red ant: correct, with confidence


def make_run(folder: Path, probabilities: np.ndarray) -> FinishedRun:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "settings": {"synthetic": False, "recipe": "any", "seed": 0}, "git_changes": False,
        "command": f"python train.py --recipe {folder.name}", "git_commit": "0123456789abcdef"}))
    np.savez(folder / "predictions.npz", logits=np.log(probabilities).astype(np.float16), hash=TEST.hashes,
             weights_sha256="of no weights")
    return FinishedRun(folder, published=True)


def make_row(recipe: str, top1: float, parameters: int, std: float | None = None) -> dict[str, Any]:
    number = {"mean": top1, "std": std}
    machine = {"processor": "A processor with a rather long name", "threads": 2}
    return {"recipe": recipe, "seeds": [0], "top1": number, "top5": number, "superclass": number,
            "parameters": parameters, "train_seconds": [90.0], "train_flops": 2 * 10**14, "precision": "float32",
            "device": "cpu", "machines": [machine], "command": f"python train.py --recipe {recipe} --train-on-all"}


ROWS = [make_row("small", 41.5, 900_000), make_row("large", 9.25, 10_000_000, 0.5), make_row("middle", 70, 5_000_000)]


def make_report(folder: Path) -> Path:
    """Write the report, in a new `folder` that holds its runs too."""
    from matplotlib.figure import Figure

    folder.mkdir()
    figure = Figure(figsize=(12, 4))
    figure.subplots().set(xlabel="epoch", ylabel="loss (nats)")
    good, crabs = make_run(folder / "good-s0", GOOD), make_run(folder / "crabs-s0", CRABS)
    path = folder / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "COLUMNS", 3)  # so that the four images of a class take two rows
        write_report([crabs, good], ROWS, TEST, good, {"Learning <curves>": figure}, path)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_report(tmp_path_factory.mktemp("report") / "first")


# ---- The file -------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file(path: Path) -> None:
    text = path.read_text()
    addresses = re.findall(r"""(?:\b(?:src|srcset|href|action)=["']?|url\(["']?)([^"')\s]+)""", text)
    assert len(addresses) >= 4  # the figure and the images of three classes
    assert [address for address in addresses if not address.startswith("data:")] == []


def test_equal_inputs_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    assert make_report(tmp_path / "second").read_bytes() == path.read_bytes()


def test_a_page_that_is_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_BYTES", 10_000)
    with pytest.raises(UserError, match="MB"):
        make_report(tmp_path / "report")
    assert not (tmp_path / "report" / "report.html").exists()


def test_a_figure_has_alternative_text(path: Path) -> None:
    assert 'alt="Learning &lt;curves&gt;: loss (nats) against epoch"' in path.read_text()


# ---- The page in a browser ------------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium with one page in it."""

    def __init__(self, port: int, chromium: str) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        options = {"binary": chromium, "args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._base += "/" + self._call("POST", "", capabilities={"alwaysMatch": wanted})["sessionId"]

    def _call(self, method: str, command: str, **body: Any) -> Any:
        request = urllib.request.Request(self._base + command, method=method,
                                         data=json.dumps(body).encode() if method == "POST" else None)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def close(self) -> None:
        self._call("DELETE", "")

    def open(self, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self._devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("POST", "/url", url=path.resolve().as_uri())

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self._call("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a function with this body in the page; returns its result."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def element(self, selector: str) -> str:
        (element,) = self._call("POST", "/elements", using="css selector", value=selector)[:1]
        return "/element/" + next(iter(element.values()))

    def texts(self, selector: str) -> list[str]:
        """The visible text of each element that matches the selector."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", selector)

    def click(self, selector: str) -> None:
        self._call("POST", self.element(selector) + "/click")

    def press(self, selector: str, key: str) -> None:
        self._call("POST", self.element(selector) + "/value", text=key)

    def choose(self, select: str, option: str) -> None:
        self.click(f"{select} option[value='{option}']")

    def screenshot(self, selector: str = "") -> np.ndarray:
        """The window or an element, uint8 [height, width, 3]."""
        content = self._call("GET", (self.element(selector) if selector else "") + "/screenshot")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))

    def errors(self) -> list[str]:
        """Messages on the console since the page was opened, or since the last call."""
        return [entry["message"] for entry in self._call("POST", "/se/log", type="browser")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = next(int(found[1]) for line in process.stdout if (found := re.search(r"on port (\d+)\.$", line.strip())))
        try:
            browser = Browser(port, chromium)
        except urllib.error.HTTPError as error:
            pytest.skip(f"chromium does not start here: {error.read()[:200]!r}")
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def page(browser: Browser, path: Path) -> Browser:
    browser.open(path)
    return browser


def gallery(page: Browser) -> list[str]:
    return page.run("return [...document.querySelectorAll('#gallery button')].map((e) => e.ariaLabel)")


def test_the_console_stays_empty(page: Browser) -> None:
    page.choose("#run", "1")
    page.click("thead button")
    page.click("#gallery button")
    assert page.errors() == []


def test_a_heading_sorts_its_column_in_both_orders(page: Browser) -> None:
    recipes = "tbody th"
    assert page.texts(recipes) == ["middle", "small", "large"]  # best first
    assert page.run("return document.querySelector('[aria-sort=descending]').innerText") == "top-1 (%)"
    page.click("th:nth-child(7) button")
    assert page.texts(recipes) == ["small", "middle", "large"]  # by their parameters, as numbers
    page.press("th:nth-child(7) button", "\ue007")  # the enter key
    assert page.texts(recipes) == ["large", "middle", "small"]
    assert page.run("return [...document.querySelectorAll('[aria-sort]')].map((e) => [e.innerText, e.ariaSort])") \
        == [["parameters", "descending"]]
    page.click("th:nth-child(1) button")
    assert page.texts(recipes) == ["large", "middle", "small"]  # by their names


def test_the_gallery_starts_with_a_class_by_confidence(page: Browser) -> None:
    assert gallery(page) == ["red ant, correct, 100%", f"red ant, predicted as {BEE}, 90%",
                             *2 * ["red ant, correct, 60%"]]
    assert page.texts("#count") == ["4 images"]


def test_the_gallery_filters(page: Browser) -> None:
    page.choose("#class", "1")
    assert len(gallery(page)) == 4
    page.choose("#verdict", "wrong")
    assert gallery(page) == [f"{BEE}, predicted as crab, 70%"]
    assert page.texts("#count") == ["1 image"]
    page.choose("#class", "2")
    assert gallery(page) == []
    assert page.texts("#count") == ["0 images"]
    page.choose("#class", "")
    page.choose("#order", "1")
    assert gallery(page) == [f"{BEE}, predicted as crab, 70%", f"red ant, predicted as {BEE}, 90%"]
    page.choose("#verdict", "right")
    assert len(gallery(page)) == 10


def test_another_run_can_be_chosen(page: Browser) -> None:
    assert page.texts("#run option") == ["good-s0", "crabs-s0"]  # the chosen one first
    page.choose("#run", "1")
    assert gallery(page) == 4 * ["red ant, predicted as crab, 70%"]
    page.choose("#class", "2")
    assert gallery(page) == 4 * ["crab, correct, 70%"]


def test_an_image_shows_its_five_guesses(page: Browser) -> None:
    page.click("#gallery button:nth-child(2)")
    assert page.texts("#guesses h3") == [f"red ant, predicted as {BEE}"]
    assert page.texts("#guesses li") == [f"{BEE}\n90%", "red ant\n8%", "crab\n1%", "worm\n1%", "oak\n<1%"]
    page.press("#gallery button:nth-child(2)", "\ue012")  # the left arrow key
    assert page.texts("#guesses li")[:2] == ["red ant\n100%", f"{BEE}\n<1%"]


def test_every_image_has_its_own_pixels(page: Browser) -> None:
    """In every class, the k-th image has the color of its k-th test image, in the gallery and enlarged."""
    page.choose("#run", "1")  # equally confident about all, so they keep their order
    for label in range(3):
        page.choose("#class", str(label))
        for place, color in enumerate(COLORS[label == LABELS], start=1):
            page.click(f"#gallery button:nth-child({place})")
            small, large = page.screenshot(f"#gallery button:nth-child({place})"), page.screenshot("#guesses .image")
            assert small.shape == (64, 64, 3)
            for shown in (small[8:40, 8:40], large[20:-20, 20:-20]):
                np.testing.assert_allclose(shown.mean((0, 1)), color, atol=12)  # WebP changes colors slightly


def test_a_long_gallery_is_shown_in_parts(browser: Browser, path: Path, tmp_path: Path) -> None:
    short = tmp_path / "report.html"
    short.write_text(path.read_text().replace("const PAGE = 100", "const PAGE = 7"))
    browser.open(short)
    browser.choose("#class", "")
    assert len(gallery(browser)) == 7
    assert browser.texts("#count") == ["12 images, 7 shown"]
    browser.click("#more")
    assert len(gallery(browser)) == 12
    assert browser.run("return document.getElementById('more').hidden")


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_the_window(width: int, browser: Browser, path: Path) -> None:
    browser.open(path, width=width)
    assert browser.run("return window.innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    outside = """return [...document.body.querySelectorAll("*")].filter((e) => !e.closest(".scroll > *") &&
        e.getBoundingClientRect().right > document.documentElement.clientWidth).map((e) => e.outerHTML.slice(0, 80))"""
    assert browser.run(outside) == []


CONTRASTS = """
function parts(color) { return color.match(/[\\d.]+/g).map(Number); }
function linear(c) { return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }
function luminance(color) {
  const [r, g, b] = parts(color).map((part) => linear(part / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ground(element) {
  const color = getComputedStyle(element).backgroundColor;
  return parts(color)[3] === 0 ? ground(element.parentElement) : color;
}
return [...document.body.querySelectorAll("*")]
  .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => {
    const [dark, light] = [getComputedStyle(e).color, ground(e)].map(luminance).sort((a, b) => a - b);
    return [e.outerHTML.slice(0, 80), (light + 0.05) / (dark + 0.05)];
  });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark_mode(scheme: str, browser: Browser, path: Path) -> None:
    browser.open(path, scheme=scheme)
    corner = browser.screenshot()[0, 0].mean()
    assert corner > 200 if scheme == "light" else corner < 50
    contrasts = browser.run(CONTRASTS)
    assert len(contrasts) > 30
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []  # WCAG 2.2, 1.4.3, level AA
