"""The documents that say how to do something: a test does what they say.

The commands of a document run in a copy of the repository, all in one process: `python -m tests.test_documents`.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from common.command_line import exit_status
from dataset import synthetic
from evaluation.finished_runs import FinishedRun
from evaluation.images import answer, answer_text, find_weights
from models import load_model
from tests.helpers import MACHINE, ROOT, after_step, train_tiny

SHORT = ("--synthetic", "--batch-size", "50", "--epochs", "1", "--sides", "16", "--average", "0", *MACHINE)
CHECK = ("--synthetic", "--batch-size", "8", "--epochs", "60", "--sides", "16", "--loss", "cross-entropy", *MACHINE[2:])
INTERRUPTED = "python train_cnn.py --model yours --name yours-s0"


def code_blocks(document: str, language: str) -> list[str]:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_python(*words: str, cwd: Path) -> str:
    """Run Python in the folder `cwd`, with the project's modules; returns what it prints."""
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- The tour -------------------------------------------------------------------------------------------------------

TOUR = ROOT / "docs" / "tour.ipynb"


def test_the_tour_is_committed_as_it_ran() -> None:
    """Every cell ran, in order and without an error, and the file stays small."""
    cells = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds and len(kinds) >= 8
    assert TOUR.stat().st_size < 400_000


def test_the_tour_shows_what_the_network_answers_today() -> None:
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    (run,) = re.findall('^RUN = "(.*?)"', "".join(line for cell in cells for line in cell["source"]), re.MULTILINE)
    (cell,) = (cell for cell in cells if "answer_text(answer(" in "".join(cell["source"]))
    (printed,) = cell["outputs"]
    (drawing,) = re.findall('Path\\("(.*?)"\\)', "".join(cell["source"]))
    today = answer_text({**answer(load_model(find_weights(run)), ROOT / drawing), "file": drawing})
    assert "".join(printed["text"]) == today + "\n"


@pytest.mark.slow
def test_the_tour_runs(tmp_path: Path) -> None:
    """On CIFAR-100 if it is here, else with a network trained on synthetic images."""
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbclient (requirements-extra.txt)")
    nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient (requirements-extra.txt)")
    pytest.importorskip("ipykernel", reason="the notebook needs ipykernel (requirements-extra.txt)")
    notebook = nbformat.read(TOUR, as_version=4)
    if "CIFAR100_DIR" not in os.environ:
        assert train_tiny(tmp_path, "--name", "tiny") == 0
        (cell,) = (cell for cell in notebook.cells if 'RUN = "published/' in cell.source)
        cell.source = re.sub('RUN = ".*"', f"RUN = {str(tmp_path / 'tiny')!r}", cell.source)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", ())
                if "image/jpeg" in output.get("data", {})]
    assert len(pictures) == 5


# ---- Your own images ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_learns_own_images_as_the_document_says(tmp_path: Path) -> None:
    """Two classes of 10 training images, which differ in shape and not in color."""
    script, prediction = code_blocks("own-images.md", "python")
    for part, seed in (("train", 0), ("val", 1)):
        images, labels = synthetic.make_synthetic("val", seed)
        for name, label in (("disc", 0), ("square", 20)):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for number, image in enumerate(images[labels == label]):
                photo = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((90, 64))
                photo.save(tmp_path / "photos" / part / name / f"{number}.png")
    for folder in ("train", "train/disc"):
        (tmp_path / "photos" / folder / ".DS_Store").touch()  # as on a Mac
    photo.save(tmp_path / "photo.jpg")
    (tmp_path / "own.py").write_text(script, encoding="utf-8")
    printed = run_python("-c", "import own\n" + prediction, cwd=tmp_path)
    assert float(re.findall(r"val acc ([\d.]+)%", printed)[-1]) >= 80
    assert load_model(tmp_path / "own.safetensors").model_args["num_classes"] == 2
    assert printed.splitlines()[-2] == "('disc', 'square')" and "tensor([" in printed.splitlines()[-1]


# ---- Your own network -----------------------------------------------------------------------------------------------


def test_a_network_is_added_as_the_document_says(tmp_path: Path) -> None:
    """One file and one line, and every command works; the first training is interrupted, and resumed by a command."""
    for place in ("common", "dataset", "docs", "evaluation", "models", "tests", "tools", "training"):
        shutil.copytree(ROOT / place, tmp_path / place, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in ("*.py", "pyproject.toml"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, tmp_path / file.relative_to(ROOT))
    network, line = code_blocks("own-network.md", "python")
    (tmp_path / "models" / "yours.py").write_text(network, encoding="utf-8")
    registry = tmp_path / "models" / "__init__.py"
    before, end, after = registry.read_text(encoding="utf-8").partition("\n}\n")  # the end of _PLACES
    registry.write_text(before + "\n" + line.rstrip() + end + after, encoding="utf-8")
    run_python("-m", "tests.test_documents", cwd=tmp_path)
    statuses = json.loads((tmp_path / "statuses.json").read_text())
    (commands,) = code_blocks("own-network.md", "sh")
    assert list(statuses) == commands.splitlines()
    assert statuses == dict.fromkeys(statuses, 0) | {INTERRUPTED: 130}


def follow() -> dict[str, int]:
    """The exit statuses of the commands of own-network.md, with flags that make them short."""
    synthetic.PER_CLASS |= {"train": 5, "val": 2, "test": 2}
    (commands,) = code_blocks("own-network.md", "sh")
    statuses = {}
    for command in commands.splitlines():
        _, script, *words = shlex.split(command)
        with pytest.MonkeyPatch.context() as patch:
            if command == INTERRUPTED:
                after_step(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
            if script == "predict.py":
                patch.setattr(FinishedRun, "synthetic", False)  # else it refuses to predict CIFAR-100's classes
            if script == "-m":  # pytest
                statuses[command] = int(pytest.main([*words[1:], "-n0"]))
            else:
                main = importlib.import_module(script.removesuffix(".py")).main
                flags = CHECK if "--overfit-batch" in words else SHORT if "--name" in words else ()
                statuses[command] = exit_status(partial(main, [*words, *flags]))
    return statuses


if __name__ == "__main__":
    Path("statuses.json").write_text(json.dumps(follow()))
