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
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from evaluation import report
from evaluation.finished_runs import FinishedRun
from evaluation.report import cited_rows, training_copies, write_report
from evaluation.tables import CITED
from utils import Split


class TinyTestSet(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.images)


BEE = "</script><b>bee&"  # looks like markup
CLASSES = ("red_ant", BEE, "crab", "worm", "oak", "elm")  # there are images of the first three
PER_CLASS = 4
LABELS = np.tile(np.arange(3), PER_CLASS)  # not sorted by class, like the test set
COLORS = np.random.default_rng(0).integers(40, 216, (len(LABELS), 3), dtype=np.uint8)
TEST = TinyTestSet(
    images=torch.from_numpy(COLORS).view(-1, 3, 1, 1).expand(-1, 3, 32, 32).contiguous(),
    hashes=np.arange(len(LABELS), dtype=np.uint64), places=100 + np.arange(len(LABELS)),
    fine_labels=LABELS, coarse_labels=np.array([0, 0, 1])[LABELS], coarse_of_fine=np.array([0, 0, 1, 1, 2, 2]),
    distinct=np.arange(len(LABELS)) != 7,
    fine_names=CLASSES, coarse_names=("insects", "sea_animals", "trees"))
COPY = np.array([250, 10, 20], dtype=np.uint8)  # the color of the training image that the third bee nearly repeats

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


BENCHMARK = """A machine

| recipe | epochs | training FLOPs | training time | test accuracy (%) |
|---|---:|---:|---:|---:|
| --recipe fast | 9 | 1.9e14 | 7.4 min | 70.4 |
| theirs/short | 7 | 5.9e14 | 17.4 min | 70.7 |
| theirs/long | 200 | 2.6e15 | 6.6 h | 68.1 |
"""
ROWS = [make_row("small", 41.5, 900_000), make_row("large", 9.25, 10_000_000, 0.5), make_row("middle", 70, 5_000_000)]


def make_report(folder: Path, *, alone: bool = False, repository: str = "") -> Path:
    """Write the report, in a new `folder` that holds its runs too; `alone`, only about the good one."""
    from matplotlib.figure import Figure

    folder.mkdir()
    figures = {name: Figure(figsize=(12, 4)) for name in ("curves", "accuracy-time", "confusion")}
    for name, figure in figures.items():
        figure.suptitle(f"The <{name}>")
        figure.subplots().set(xlabel="epoch", ylabel="loss (nats)")
    figures["accuracy-time"].caption, figures["accuracy-time"].finding = "Up is better.", "Large is slow & good."
    good, crabs = make_run(folder / "good-s0", GOOD), make_run(folder / "crabs-s0", CRABS)
    (folder / "published" / "benchmarks").mkdir(parents=True)
    (folder / "published" / "benchmarks" / "time_to_accuracy.md").write_text(BENCHMARK)
    runs, rows = ([good], ROWS[:1]) if alone else ([crabs, good], ROWS)
    shown = SimpleNamespace(runs=runs, rows=rows, test=TEST, alone=alone, results_dir=folder, corrupted=[good],
                            calibrated_logits=lambda run: run.logits(TEST))
    copy = torch.from_numpy(COPY).view(3, 1, 1).expand(3, 32, 32)
    path = folder / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GITHUB_REPOSITORY", repository)
        patch.setattr(report, "_corrupted", lambda run, test: (run.name, [43.21, *8 * [12.0]]))
        patch.setattr(report, "SHEET_COLUMNS", 3)  # so that the four images of a class take two rows
        write_report(shown, good, figures, path, copies={7: (copy, "red_ant")}, cited=cited_rows(folder))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_report(tmp_path_factory.mktemp("report") / "first")


# ---- The file -------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file(path: Path) -> None:
    text = path.read_text()
    addresses = re.findall(r"""(?:\b(?:src|srcset|href|action)=["']?|url\(["']?)([^"')\s]+)""", text)
    assert sum(address.startswith("data:") for address in addresses) >= 4  # images of three classes, and a copy
    assert [address for address in addresses if not address.startswith(("data:", "#"))] == []


def test_the_page_has_the_accuracies_on_corrupted_images(path: Path) -> None:
    text = path.read_text()
    assert '<td data-heading="unchanged">43.2</td>' in text and text.count(">12.0</td>") == 8


def test_on_github_the_page_links_to_the_repository(tmp_path: Path) -> None:
    text = make_report(tmp_path / "report", repository="some/where").read_text()
    assert '<a href="https://github.com/some/where">some/where</a>' in text


def test_equal_inputs_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    assert make_report(tmp_path / "second").read_bytes() == path.read_bytes()


def test_a_page_that_is_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_BYTES", 10_000)
    with pytest.raises(UserError, match="MB"):
        make_report(tmp_path / "report")
    assert not (tmp_path / "report" / "report.html").exists()


def test_alternative_text_is_the_finding(path: Path) -> None:
    text = path.read_text()
    assert 'role="img" aria-label="Large is slow &amp; good. Up is better."' in text
    assert 'role="img" aria-label="The &lt;curves&gt;: loss (nats) against epoch"' in text


def test_figures_take_the_colors_of_the_page(path: Path) -> None:
    """Black is the text's color and white the background's, so a figure is dark in dark mode."""
    drawn = "".join(re.findall(r"<svg role.*?</svg>", path.read_text(), re.DOTALL))
    assert ": color-mix(in srgb, var(--text) 100%, var(--page))" in drawn
    assert ": color-mix(in srgb, var(--text) 0%, var(--page))" in drawn
    assert re.findall(r"#(?:000000|ffffff)|<style| id=\"(?:figure|axes)", drawn) == []


def test_without_javascript_table_and_figures_remain(path: Path) -> None:
    text = path.read_text()
    head, body = text.split("</head>")
    assert "<noscript><style>.script { display: none" in head
    outside = re.sub(r"<noscript>.*?</noscript>", "", body, flags=re.DOTALL)
    assert [name for name in ("curves", "accuracy-time", "confusion") if f"The &lt;{name}&gt;." in outside] \
        == ["curves", "accuracy-time"]  # with JavaScript, the page draws the confusion matrix
    assert "The &lt;confusion&gt;." in body and body.count("<tr") == 1 + len(ROWS) + len(CITED) + 2 + 2


def test_the_benchmark_adds_published_recipes(tmp_path: Path) -> None:
    assert [row["name"] for row in cited_rows(tmp_path)] == [cited["model"] for cited in CITED]
    folder = tmp_path / "published" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "time_to_accuracy.md").write_text(BENCHMARK)
    *_, short, long = cited_rows(tmp_path)
    assert [short["name"], long["name"]] == ["theirs/short", "theirs/long"]
    assert short["note"] == "accuracy of its authors; minutes timed by us on A machine"
    assert [value for _, value in short["cells"]] == [70.7, None, None, None, None, None, 17.4, 5.9e14]
    assert long["cells"][-2] == ("396", 396)


def test_a_near_duplicate_has_its_training_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Split(torch.stack([torch.full((3, 32, 32), gray, dtype=torch.uint8) for gray in (7, 8)]),
                  torch.tensor([4, 5]), torch.tensor([2, 2]), CLASSES, ("insects", "sea_animals", "trees"))
    monkeypatch.setattr(report, "load_cifar100", lambda data_dir, *, train_on_all: (train, None))
    path = tmp_path / "near_duplicates.csv"
    assert training_copies(path, TEST, "") == {}  # without a list
    path.write_text(f"test_hash,train_hash\n{5:016x},{train.hashes[1]:016x}\n{6:016x},{0:016x}\n")
    ((position, (image, name)),) = training_copies(path, TEST, "").items()  # the other training image is unknown
    assert (position, int(image.unique()), name) == (5, 8, "elm")
    path.write_text(f"test_hash\n{5:016x}\n")
    with pytest.raises(UserError, match="needs a column train_hash"):
        training_copies(path, TEST, "")


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

    def open(self, path: Path, *, width: int = 1280, scheme: str = "light", fragment: str = "") -> None:
        self._devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("POST", "/url", url=path.resolve().as_uri() + (fragment and f"#{fragment}"))
        if fragment:
            self._call("POST", "/refresh")  # another fragment alone does not load the page again

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

    def hover(self, selector: str, right: float, down: float) -> None:
        """Move the mouse to a place in an element, as shares of its width and height."""
        box = self.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
        self._mouse({"type": "pointerMove", "x": round(box["left"] + right * box["width"]),
                     "y": round(box["top"] + down * box["height"])})

    def click_here(self) -> None:
        self._mouse({"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})

    def _mouse(self, *actions: dict[str, Any]) -> None:
        self._call("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": actions}])

    def wait(self, condition: str) -> None:
        """Wait until a function with this body in the page returns true."""
        end = time.monotonic() + 5
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def press(self, selector: str, key: str) -> None:
        self._call("POST", self.element(selector) + "/value", text=key)

    def choose(self, select: str, option: str) -> None:
        """Choose the option of a select by its value."""
        self.run("""const select = document.querySelector(arguments[0]);
            select.value = arguments[1];
            if (select.value !== arguments[1]) throw new Error(`no option ${arguments[1]}`);
            select.dispatchEvent(new Event("change", {bubbles: true}))""", select, option)

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


def state(page: Browser) -> dict[str, str]:
    """The choices in the address of the page."""
    return dict(parse_qsl(urlsplit(page.run("return location.href")).fragment))


ANT, ANOTHER = f"red ant, taken for {BEE}, 90%", f"{BEE}, taken for crab, 70%"  # the mistakes of the good run


def test_the_console_stays_empty(page: Browser) -> None:
    page.choose("[name=run]", "crabs-s0")
    page.click("thead button")
    page.click("#gallery button")
    page.click("#pairs button")
    assert page.errors() == []


def test_a_heading_sorts_its_column_best_first(page: Browser) -> None:
    def names() -> list[str]:
        return [text.split("\n")[0] for text in page.texts("table[aria-labelledby=results] tbody th")]

    ours = ["middle", "small", "large"]
    assert [name for name in names() if name in ours] == ours  # best first
    assert page.run("return document.querySelector('[aria-sort=descending]').innerText") == "top-1 (%)"
    page.click("th:nth-child(7) button")
    assert names()[:3] == ["small", "middle", "large"]  # by their parameters; rows without any come last
    page.press("th:nth-child(7) button", "\ue007")  # the enter key
    assert names()[:3] == ["large", "middle", "small"]
    assert page.run("return [...document.querySelectorAll('[aria-sort]')].map((e) => [e.innerText, e.ariaSort])") \
        == [["parameters", "descending"]]
    page.click("th:nth-child(2) button")
    assert names()[0] == "theirs/short" and names()[-1] == "guessing"
    page.click("th:nth-child(8) button")
    assert names()[:4] == ["middle", "small", "large", "theirs/short"]  # by minutes, in their order where equal


def test_the_gallery_opens_on_confident_mistakes(page: Browser) -> None:
    assert gallery(page) == [ANT, ANOTHER]
    assert page.texts("#count") == ["2 images"]
    assert page.texts("[name=run] option") == ["good-s0 83.3%", "crabs-s0 33.3%"]  # the chosen one first


def test_the_gallery_filters(page: Browser) -> None:
    page.choose("[name=show]", "all")
    assert page.texts("#count") == ["12 images; good-s0 is right on 10"]
    page.choose("[name=label]", "all insects")
    assert len(gallery(page)) == 8
    page.choose("[name=guess]", "crab")
    assert gallery(page) == [ANOTHER]
    page.choose("[name=label]", "red ant")
    assert gallery(page) == [] and page.texts("#count") == ["no image passes all filters"]
    page.click("[type=reset]")
    page.wait("return gallery.childElementCount === 2")  # the fields are reset after the click
    assert gallery(page) == [ANT, ANOTHER]
    page.choose("[name=order]", "unsure")
    assert gallery(page) == [ANOTHER, ANT]


def test_two_runs_can_be_compared(page: Browser) -> None:
    page.choose("[name=show]", "only-this")
    assert state(page) == {"other": "crabs-s0", "show": "only-this"}
    assert len(gallery(page)) == 6 and all(", correct, " in name for name in gallery(page))
    assert page.texts("#details h4") == ["good-s0", "crabs-s0"]
    assert {text.splitlines()[-1] for text in page.texts("#gallery button")} == {"B: crab"}
    page.choose("[name=show]", "only-other")
    assert gallery(page) == []
    page.choose("[name=show]", "neither")
    assert gallery(page) == [ANT, ANOTHER]


def test_a_page_about_one_run_has_no_comparison(browser: Browser, tmp_path: Path) -> None:
    browser.open(make_report(tmp_path / "one", alone=True), fragment="other=crabs-s0&show=only-this")
    assert gallery(browser) == [ANT, ANOTHER]
    assert browser.texts("[name=other], [value=neither]") == [] and browser.errors() == []


def test_search_finds_names_and_numbers(page: Browser) -> None:
    page.choose("[name=show]", "all")
    page.press("[name=search]", "INSECT")
    assert len(gallery(page)) == 8 and state(page)["search"] == "INSECT"
    page.click("[type=reset]")
    page.wait("return document.querySelector('[name=search]').value === ''")
    page.press("[name=search]", "109")  # also an image that the filters leave out
    assert gallery(page) == ["red ant, correct, 100%"]


def test_the_address_keeps_the_choices(browser: Browser, path: Path, page: Browser) -> None:
    page.choose("[name=run]", "crabs-s0")
    page.choose("[name=label]", BEE)
    page.click("#gallery button:nth-child(3)")
    assert state(page) == {"run": "crabs-s0", "label": BEE, "image": "107"}
    address = page.run("return location.href")
    page.run("history.back()")
    page.wait("return document.querySelector('[name=label]').value === ''")
    assert len(gallery(page)) == 8
    browser.open(path)
    browser.open(path, fragment=urlsplit(address).fragment)
    assert gallery(page) == 4 * [ANOTHER]
    assert page.texts("#details p") == ["test image 107, insects"]
    browser.open(path, fragment="run=unknown&show=nothing&label=no+class&image=999999")
    assert gallery(page) == [ANT, ANOTHER]


def test_an_image_shows_five_guesses_and_its_copy(page: Browser) -> None:
    assert page.texts("#details h3") == [f"red ant, taken for {BEE}"]
    assert page.texts("#details li") == [f"{BEE}\n90%", "red ant\n8%", "crab\n1%", "worm\n1%", "oak\n<1%"]
    assert page.texts("#details .copy") == []
    page.press("#gallery button:nth-child(1)", "\ue014")  # the right arrow key
    assert page.texts("#details h3") == [f"{BEE}, taken for crab"]
    assert page.texts("#details .copy") == ["nearly repeats this training image, which is labeled red ant"]
    shown = page.screenshot("#details .copy .picture")
    np.testing.assert_allclose(shown[8:-8, 8:-8].mean((0, 1)), COPY, atol=12)


def test_arrow_keys_move_in_the_grid_with_one_tab_stop(browser: Browser, path: Path) -> None:
    browser.open(path, width=390)  # three columns
    browser.choose("[name=show]", "all")
    at = "return [...document.getElementById('gallery').children].indexOf(document.activeElement)"
    browser.click("#gallery button")
    for key, place in (("\ue014", 1), ("\ue015", 4), ("\ue012", 3), ("\ue013", 0), ("\ue010", 11)):
        browser.press("#gallery [tabindex='0']", key)  # right, down, left, up, end
        assert browser.run(at) == place
        assert len(browser.texts("#gallery [tabindex='0']")) == 1


def test_every_image_has_its_own_pixels(page: Browser) -> None:
    """In every class, the k-th image has the color of its k-th test image, in the gallery and enlarged."""
    page.choose("[name=run]", "crabs-s0")  # equally confident about all, so they keep their order
    page.choose("[name=show]", "all")
    for label in range(3):
        page.choose("[name=label]", CLASSES[label].replace("_", " "))
        page.press("#gallery [tabindex='0']", "\ue010")  # the end key
        large, tiles = page.screenshot("#details .picture"), page.screenshot("#gallery")
        lefts = page.run("return [...gallery.children].map((e) => e.offsetLeft)")
        colors = COLORS[label == LABELS]
        for left, color in zip(lefts, colors, strict=True):
            np.testing.assert_allclose(tiles[20:90, left + 10:left + 80].mean((0, 1)), color, atol=12)  # WebP is lossy
        np.testing.assert_allclose(large[20:-20, 20:-20].mean((0, 1)), colors[-1], atol=12)


def test_scrolling_loads_more_images(browser: Browser, path: Path, tmp_path: Path) -> None:
    short = tmp_path / "report.html"
    short.write_text(path.read_text().replace("PAGE = 120", "PAGE = 2").replace('"600px"', '"0px"')
                     .replace("max-height: 55vh", "max-height: 200px"))
    browser.open(short, width=390)
    browser.choose("[name=show]", "all")
    browser.wait("return gallery.childElementCount >= 4")  # the second row ends below the box
    assert len(gallery(browser)) < 12
    browser.run("gallery.parentElement.scrollTop = 1000")
    browser.wait("return gallery.childElementCount > 6")


def test_the_confusion_matrix_opens_its_images(page: Browser) -> None:
    cells = len(CLASSES)
    page.run("document.getElementById('matrix').scrollIntoView({block: 'center'})")
    page.hover("#matrix", 1.5 / cells, 0.5 / cells)  # the first row is the red ant, the second column the bee
    assert page.texts("#cell-text") == [f"red ant taken for {BEE}: 1 of 4 images"]
    page.click_here()
    assert gallery(page) == [ANT]
    assert state(page) == {"label": "red ant", "guess": BEE}
    page.press("#matrix", "\ue015\ue014\ue007")  # down, right, enter
    assert gallery(page) == [ANOTHER]


def test_the_details_follow_the_run(page: Browser) -> None:
    assert page.texts("#pairs button")[0].startswith(f"red ant taken for {BEE}")
    assert page.texts("#classes button") == ["red ant\n75", f"{BEE}\n75", "crab\n100"]
    page.choose("#run-again", "crabs-s0")
    assert state(page) == {"run": "crabs-s0"} and len(gallery(page)) == 8
    assert page.texts("#pairs button") == [f"{name} taken for crab\n4 of 4 images" for name in ("red ant", BEE)]
    assert "70.0% sure on average and right on 33.3%" in page.texts("#reliability-text")[0]
    page.click("#classes button")
    assert gallery(page) == 4 * ["red ant, taken for crab, 70%"]


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
