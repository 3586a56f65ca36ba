"""The layout of the project: who imports whom, who may open the test set, and how code and documents are written."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_mlp", "train_cnn", "evaluate", "predict")
ALSO_AT_THE_TOP = ("utils", "hubconf")
SHARED = {"models", "common", "utils"}
EVERYTHING = {*SHARED, "training", "evaluation", *SCRIPTS}
MAY_IMPORT = {  # by room, and for the modules at the top level by module; nothing may import tools and benchmarks
    "models": {"models"},
    "dataset": {"common", "dataset"},
    "common": {"models", "common"},
    "utils": {"common", "dataset"},
    "training": {*SHARED, "training"},
    "evaluation": {*SHARED, "evaluation"},
    "train_mlp": {*SHARED, "training"},
    "train_cnn": {*SHARED, "training"},
    "evaluate": {*SHARED, "evaluation"},
    "predict": {*SHARED, "evaluation"},
    "hubconf": set(),  # it is imported into other programs, so it imports models/ under another name
    "tools": EVERYTHING,
    "benchmarks": EVERYTHING,
    "docs": set(),
}
PACKAGES = {"models", "common", "dataset", "training", "evaluation", "tools", "benchmarks"}
POSIX = {"fcntl", "resource", "termios", "pwd", "grp"}


def files(*patterns: str) -> list[Path]:
    """Files of the project that match, without results/ and hidden folders such as .venv/."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not name(path).startswith(("results/", ".")))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


ALL = files("*.py", "*/*.py", "*/*/*.py")
SOURCES = [path for path in ALL if room(path) != "tests"]
DOCUMENTS = files("*.md", "docs/*.md", "data/*.md")
TEXTS = [*ALL, *DOCUMENTS, *files("docs/*.ipynb", "Makefile", "*.toml", "*.cff", "requirements*.txt",
                                  "evaluation/*.html", "evaluation/*.css", "evaluation/*.js")]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules_in(node: ast.AST, package: str = "") -> set[str]:
    """Dotted names that an import statement imports: `from a.b import c` counts as a, a.b and a.b.c.

    `package` is the one that a relative import starts from.
    """
    names = set()
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 or (node.level == 1 and package), "a relative import, which this test does not follow"
        source = ".".join(filter(None, [package if node.level else "", node.module]))
        names = {f"{source}.{alias.name}" for alias in node.names}
    parts = [dotted.split(".") for dotted in names]
    return {".".join(words[:count]) for words in parts for count in range(1, len(words) + 1)}


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of everything that a file imports, also inside functions."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return frozenset().union(*(modules_in(node, package) for node in ast.walk(parsed(path))))


def indirect_imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, itself or through other files of the project."""
    seen, todo = set(), [path]
    while todo:
        new = imports(todo.pop()) - seen
        seen |= new
        paths = [ROOT.joinpath(*dotted.split(".")) for dotted in new]
        todo += [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]
    return seen


def names_used(path: Path) -> set[str]:
    """Every name that a file's code mentions: variables, attributes, imports."""
    nodes = list(ast.walk(parsed(path)))
    return {node.id for node in nodes if isinstance(node, ast.Name)} \
        | {node.attr for node in nodes if isinstance(node, ast.Attribute)} \
        | {dotted.split(".")[-1] for dotted in imports(path)}


def function(path: Path, name: str) -> ast.FunctionDef:
    return next(node for node in parsed(path).body if isinstance(node, ast.FunctionDef) and node.name == name)


def calls(node: ast.AST) -> set[str]:
    """Names of the functions and methods that are called in it."""
    called = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    return {target.id if isinstance(target, ast.Name) else getattr(target, "attr", "") for target in called}


# ---- Rooms and imports ----------------------------------------------------------------------------------------------


def test_the_top_level_has_the_scripts_and_the_loader() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {f"{module}.py" for module in (*SCRIPTS, *ALSO_AT_THE_TOP)}
    assert {room(path) for path in SOURCES} == set(MAY_IMPORT)


def test_imports_go_one_way() -> None:
    ours = set(MAY_IMPORT) | {"tests"}
    wrong = {name(path): sorted((imports(path) & ours) - MAY_IMPORT[room(path)]) for path in SOURCES}
    assert {file: rooms for file, rooms in wrong.items() if rooms} == {}


def test_each_room_states_its_rule() -> None:
    rules = {room(path): ast.get_docstring(parsed(path)) for path in files("*/__init__.py")}
    assert rules.keys() >= PACKAGES
    assert [package for package, rule in rules.items() if not rule] == []


def test_no_two_modules_share_a_name() -> None:
    counts = Counter(path.stem for path in ALL if path.stem != "__init__")
    assert [stem for stem, count in counts.items() if count > 1] == []


def test_no_file_edits_the_import_path() -> None:
    edits = [name(path) for path in ALL for node in ast.walk(parsed(path))
             if isinstance(node, ast.Attribute) and node.attr == "path" and getattr(node.value, "id", "") == "sys"]
    assert edits == []


def test_no_module_needs_posix_to_be_imported() -> None:
    """Imports inside a function are allowed."""

    def at_import(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                yield from at_import(child)

    found = {name(path): POSIX & set().union(*(modules_in(node, room(path)) for node in at_import(parsed(path))))
             for path in ALL}
    assert {file: modules for file, modules in found.items() if modules} == {}


# ---- Honesty: training sees no test image, evaluation sees no optimizer ---------------------------------------------


def test_only_two_modules_open_the_test_set() -> None:
    users = {name(path) for path in SOURCES if "load_test_set" in names_used(path)}
    assert users == {"evaluation/finished_runs.py", "tools/explore.py"}
    other_ways = {"_load_official", "make_synthetic"}
    assert {name(path) for path in SOURCES if other_ways & names_used(path)} == {"utils.py"}
    reads_files = {name(path) for path in SOURCES if "dataset.formats" in imports(path)}
    assert reads_files == {"utils.py", "dataset/download.py"}


def test_no_code_lies_among_the_data() -> None:
    """data/ is for the user's files; git ignores all but its readme."""
    assert [name(path) for path in files("data/*.py", "data/*.npy")] == []
    assert [line for line in (ROOT / ".gitignore").read_text().splitlines() if "data/" in line and "results" not in line
            ] == ["data/*", "!data/README.md"]


def test_what_trains_cannot_reach_the_test_set() -> None:
    trains = [path for path in SOURCES if "training.optimizers" in indirect_imports(path)]
    assert {name(path) for path in trains} >= {"training/loop.py", "train_mlp.py", "train_cnn.py", "tools/tune.py",
                                               "benchmarks/time_to_accuracy.py"}
    assert [name(path) for path in trains if "evaluation.finished_runs" in indirect_imports(path)] == []


def test_evaluation_sees_no_optimizer() -> None:
    for path in (*files("evaluation/*.py"), ROOT / "evaluate.py", ROOT / "predict.py"):
        assert not {"training", "torch.optim"} & indirect_imports(path), name(path)
        assert "optim" not in names_used(path), name(path)


@pytest.mark.parametrize("script", ["train_mlp.py", "train_cnn.py"])
def test_a_script_is_three_calls_from_backward(script: str) -> None:
    main = function(ROOT / script, "main")
    assert 15 <= main.end_lineno - main.lineno + 1 <= 40
    assert "train" in calls(main) and {"training.loop.train"} <= imports(ROOT / script)
    assert "training_step" in calls(function(ROOT / "training" / "loop.py", "train"))
    assert "backward" in calls(function(ROOT / "training" / "loop.py", "training_step"))


# ---- Documents and English ------------------------------------------------------------------------------------------


def test_no_file_names_a_folder_of_a_personal_machine() -> None:
    folders = [f"/{folder}/" for folder in ("home", "root", "Users")]
    found = {f"{name(path)}: {folder}" for path in (*TEXTS, *ROOT.glob(".ci/*"), *ROOT.glob(".github/*/*.yml"))
             for folder in folders if folder in path.read_text(encoding="utf-8")}
    assert found == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_in_documents_work(document: Path) -> None:
    links = re.findall(r'(?:\]\(|src=")([^)#"\s]+)', document.read_text(encoding="utf-8"))
    linked = [document.parent / link for link in links if "://" not in link]
    assert [str(file) for file in linked if not file.exists()] == []
    assert [str(file) for file in linked if file.suffix == ".png" and file.stat().st_size > 300_000] == []


STILTED = re.compile("|".join((
    r"(?<!there )\bis no (JSON|list|name|file|image|folder|number|run)\b",
    r"\bso many (pixels|epochs|images|outputs|steps)\b",
    r"\b(images|pictures|rows?|epochs?|runs?|steps?) a (step|epoch|seed|batch|second\b(?! time))",
    r"\b(go|goes|going) on with\b", r"\bthe state is saved\b", r"\bcheckpoint stands\b",
    r"\banew\b", r"\bbeside\b", r"\b(is|are|be) told\b(?! apart)", r"\bas if nothing had been\b",
    r"\bcontradict each other\b", r"\bmeans? nothing with\b", r"\b(softmax|ReLU) too many\b",
    r"\b(learn(ed|t)?|knows?|known) by heart\b", r"\bas often right as\b",
    r"\bmachine's moods?\b", r"\bcloser look beats\b",
    "What you may rely on", "What survives what", "Files from strangers",
    r"(?i:behaviour|neighbour|favour|learnt|\bcolours?\b|\bgrey\b|\bcentred?\b|\blabelled\b)",
    r"(?i:(memor|normal|initial|optim)is[ei])",
)))


def test_english_is_plain_and_american() -> None:
    """No phrase that reads as if translated: there is a plainer one for each."""
    found = [f"{name(path)}:{number}: {match.group()}" for path in TEXTS if path != Path(__file__).resolve()
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
             if (match := STILTED.search(line))]
    assert found == []


def test_docstrings_open_with_a_noun_or_a_verb() -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [(name(path), ast.get_docstring(node) or "") for path in ALL for node in ast.walk(parsed(path))
                  if isinstance(node, documented)]
    assert [(file, text.splitlines()[0]) for file, text in docstrings if text.startswith(("What ", "Whoever "))] == []
