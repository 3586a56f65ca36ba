"""Loading the published networks with torch.hub: from a clone, from a copy without .git, in a program of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import load_model
from tests.helpers import ROOT, read_json
from utils import FINE_NAMES

ROWS = {row["recipe"]: row for row in read_json(ROOT / "results" / "results.json")}
PUBLISHED = {recipe for recipe, row in ROWS.items() for seed in row["seeds"]
             if (ROOT / f"results/published/{recipe}-s{seed}/model.safetensors").exists()}
PROGRAM = """
import json, pathlib, pickle, sys, types
before = set(sys.modules)
import torch
torch_brings = set(sys.modules)
mine = sys.modules["models"] = sys.modules["utils"] = types.ModuleType("models")
model = torch.hub.load(sys.argv[1], "fast", source="local")
ours = {name for name in sys.modules if str(getattr(sys.modules[name], "__file__", "")).startswith(sys.argv[1])}
brought = {name.partition(".")[0] for name in set(sys.modules) - torch_brings}
mlp = torch.hub.load(sys.argv[1], "mlp", source="local", pretrained=False)
again = torch.hub.load(sys.argv[1], "fast", source="local")
images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
logits = model(images)
probabilities = (logits / model.temperature).softmax(1)
print(json.dumps({
    "logits": logits.tolist(), "dtype": str(logits.dtype), "training": [model.training, mlp.training],
    "classes": [model.classes[label] for label in probabilities.argmax(1)], "all": model.classes,
    "temperature": model.temperature, "same class": type(model) is type(again),
    "pickled": torch.equal(pickle.loads(pickle.dumps(model))(images), logits),
    "theirs": sys.modules["models"] is mine, "ours": sorted(ours),
    "brought": sorted(brought & {"common", "dataset", "evaluation", "training", "PIL", "matplotlib", "filelock",
                                 "tqdm"}),
}))
"""


@pytest.fixture(scope="module")
def hub_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive that torch.hub unpacks: committed files without .git, as far as hubconf.py may use them."""
    folder = tmp_path_factory.mktemp("hub") / "OWNER_REPO_main"
    folder.mkdir()
    shutil.copy(ROOT / "hubconf.py", folder)
    shutil.copytree(ROOT / "models", folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("common", "dataset", "utils.py"):  # whoever imports these here fails
        (folder / name).write_text("raise ImportError\n")
    (folder / "results").mkdir()
    shutil.copy(ROOT / "results" / "results.json", folder / "results")
    for path in (ROOT / "results" / "published").glob("*/model.safetensors"):
        (folder / "results" / "published" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, folder / "results" / "published" / path.parent.name)
    return folder


def test_a_program_loads_a_network_beyond_its_own_modules(hub_archive: Path, tmp_path: Path) -> None:
    """In another folder, with its own `models` and `utils` already imported."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, str(hub_archive)], cwd=tmp_path, text=True,
                          capture_output=True, timeout=100, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = load_model(ROOT / "results" / "published" / "fast-s0" / "model.safetensors")
    with torch.no_grad():
        logits = model(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, atol=1e-3, rtol=1e-3)
    assert found["dtype"] == "torch.float32" and found["training"] == [False, True]
    assert found["classes"] == [FINE_NAMES[label] for label in logits.argmax(1)]
    assert found["all"] == list(FINE_NAMES) and found["temperature"] == model.temperature
    assert found["same class"] and found["pickled"] and found["theirs"]
    assert found["ours"] and all(name.startswith("cifar100_models") for name in found["ours"])
    assert found["brought"] == []


@pytest.fixture
def hub() -> object:
    """hubconf.py, imported as torch.hub does."""
    return torch.hub._import_module("hubconf.py", str(ROOT / "hubconf.py"))


def test_the_entry_points_are_the_recipes_with_published_weights(hub: object) -> None:
    """`torch.hub.list` shows the callable names without an underscore."""
    listed = {name for name in dir(hub) if callable(getattr(hub, name)) and not name.startswith("_")}
    assert listed == PUBLISHED >= {"fast", "mlp", "original"}
    with pytest.raises(RuntimeError, match="Cannot find callable nothing in hubconf"):
        torch.hub.load(str(ROOT), "nothing", source="local")


def test_help_has_the_published_accuracy(hub: object) -> None:
    for recipe in PUBLISHED:
        text = getattr(hub, recipe).__doc__
        assert any(f"{recipe}: {accuracy:.2f}% on the test set" in text for accuracy in ROWS[recipe]["top1"]["each"])
        assert ROWS[recipe]["command"] in text and "[0, 1]" in text


def test_only_the_named_packages_are_needed(hub: object) -> None:
    assert hub.dependencies == ["torch", "safetensors"]


def test_weights_that_are_missing_are_no_entry_point(hub_archive: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(hub_archive, tmp_path / "copy")
    (copy / "results" / "published" / "mlp-s0" / "model.safetensors").unlink()
    names = dir(torch.hub._import_module("hubconf.py", str(copy / "hubconf.py")))
    assert "mlp" not in names and "fast" in names


def test_the_readme_loads_a_network_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(part.split("```")[0] for part in text.split("```python\n") if "torch.hub.load(" in part.split("```")[0])
    monkeypatch.chdir(ROOT)
    assert code.count("\n") == 3 and '`"OWNER/REPO"`' in text
    printed = []
    exec(code, {"torch": torch, "images": torch.rand(2, 3, 32, 32), "print": printed.append})
    assert len(printed[0]) == 2 and set(printed[0]) <= set(FINE_NAMES)
