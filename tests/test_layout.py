"""Who may import whom: training never sees test pictures, evaluation never sees an optimizer, imports go one way."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests")
USE_RECIPES = {"explore.py", "sanity_checks.py", "tune.py"}  # and benchmarks/: they train with what a script declares
MODULES = [path for path in SOURCES if path.parent.name != "benchmarks" and path.name not in USE_RECIPES]
SCRIPTS = sorted(path.stem for path in (*ROOT.glob("train_*.py"), ROOT / "evaluate.py"))
EVALUATION = [ROOT / "evaluate.py", *sorted(ROOT.glob("evaluation/*.py"))]
PROSE_AND_CODE = ("*.py", "*/*.py", "*.md", "*/*.md", "Makefile", "*.toml", "*.yml", ".ci/*", ".github/*/*")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it: `from a.b import c` counts as a, a.b and a.b.c."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which this test does not follow"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {".".join(words[:count]) for words in parts for count in range(1, len(words) + 1)}


def imports_in_turn(path: Path) -> set[str]:
    """What a file imports, by way of this project's other files too."""
    seen, todo = set(), [path]
    while todo:
        new = imports(todo.pop()) - seen
        seen |= new
        files = [ROOT.joinpath(*name.split(".")) for name in new]
        todo += [file for name in files for file in (name.with_suffix(".py"), name / "__init__.py") if file.exists()]
    return seen


def names_used(path: Path) -> set[str]:
    """Every name that a file's code mentions: variables, attributes and what it imports."""
    nodes = list(ast.walk(parsed(path)))
    return {node.id for node in nodes if isinstance(node, ast.Name)} \
        | {node.attr for node in nodes if isinstance(node, ast.Attribute)} \
        | {name.split(".")[-1] for name in imports(path)}


def test_only_who_reports_opens_the_test_set():
    users = {str(path.relative_to(ROOT)) for path in SOURCES if "load_test_set" in names_used(path)}
    assert "evaluation/runs.py" in users
    assert users <= {"evaluation/runs.py", "explore.py"}
    ways_around = {"_load_official", "make_synthetic"}
    assert {path.name for path in SOURCES if ways_around & names_used(path)} == {"utils.py"}


@pytest.mark.parametrize("path", EVALUATION, ids=lambda path: str(path.relative_to(ROOT)))
def test_evaluation_sees_no_optimizer(path):
    assert not {"engine", "torch.optim", "overfit"} & imports_in_turn(path)
    assert "optim" not in names_used(path)


def test_who_trains_sees_no_test_pictures_by_way_of_evaluation():
    training = {path.name: path for path in SOURCES if "optimizers" in imports_in_turn(path)}
    assert training.keys() >= {"engine.py", "train_mlp.py", "train_cnn.py", "time_to_accuracy.py"}
    assert [name for name, path in training.items() if "evaluation.runs" in imports_in_turn(path)] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("models/*.py")), ids=lambda path: path.name)
def test_models_know_nothing_of_data_files_or_training(path):
    forbidden = {"utils", "settings", "runs", "engine", "hardware", "overfit", "data", *SCRIPTS}
    assert not forbidden & imports(path)


def test_utils_knows_nothing_of_settings_runs_training_or_models():
    forbidden = {"settings", "runs", "engine", "models", "hardware", "overfit", *SCRIPTS}
    assert not forbidden & imports_in_turn(ROOT / "utils.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_a_script(path):
    assert not set(SCRIPTS) & imports(path)


def test_no_file_names_a_folder_of_somebodys_machine():
    folders = [f"/{name}/" for name in ("home", "root", "Users")]
    files = [path for pattern in PROSE_AND_CODE for path in ROOT.glob(pattern) if path.is_file()]
    assert {path.name for path in files} >= {"README.md", "Makefile", "utils.py", "test_layout.py"}
    found = {f"{path.relative_to(ROOT)}: {folder}" for path in files for folder in folders
             if folder in path.read_text(encoding="utf-8", errors="replace")}
    assert not found


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_what_a_document_links_to_is_there(document):
    links = re.findall(r'(?:\]\(|src=")([^)#"\s]+)', document.read_text(encoding="utf-8"))
    files = [document.parent / link for link in links if "://" not in link]
    assert [str(file) for file in files if not file.exists()] == []
    assert [str(file) for file in files if file.suffix == ".png" and file.stat().st_size > 300_000] == []
