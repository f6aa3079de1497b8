"""The project itself: lint, pins, README's commands, which module needs which, private names."""

import ast
import importlib.metadata
import inspect
import json
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("assets/**/*.md"))]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("assets/**/*.py")]
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def test_ruff_is_clean():
    for arguments in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *arguments, "."]
        done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_requirements_are_pinned_to_what_is_installed():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and line[0] != "#")
    assert "trl" in pins
    for name, version in pins.items():
        assert importlib.metadata.version(name).split("+")[0] == version


def test_the_top_level_has_its_agreed_shape():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    top = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    files = {"grpo_demo.py", "rewards.py", "requirements.txt", "README.md", "LICENSE"}
    assert top <= files | {"assets", "tests"}


def test_ci_runs_readmes_test_command():
    (command,) = re.findall(r"<!-- tests -->\n```bash\n(.*)\n```", README)
    assert command.endswith("python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests")
    assert "README.md" in (ROOT / ".ci/run").read_text()


def test_every_logged_metric_is_in_the_glossary():
    lines = (ROOT / "assets/research/runs/laptop-42/metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)} - {"runtime"}
    shown = {re.sub(r"rewards/\w+_reward_func/", "rewards/<name>/", name) for name in logged}
    glossary = (ROOT / "assets/notes/wandb.md").read_text()
    assert "accuracy/strict" in shown
    assert [name for name in shown if f"`train/{name}`" not in glossary] == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        if not file.startswith("http"):
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 16_000
    before, _, _ = README.partition("python grpo_demo.py --config")
    assert len(before.split()) <= 300
    for page in PAGES[1:]:
        assert len(page.read_text().splitlines()) <= 120, page


def test_tables_show_the_records():
    check = [sys.executable, "-m", "assets.research.tables", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rewards_runs_alone(tmp_path):
    shutil.copy(ROOT / "rewards.py", tmp_path)
    alone = [sys.executable, "-I", "-S", "rewards.py"]  # no project, no installed package
    done = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "4.000" in done.stdout, done.stderr


def own_imports(tree: ast.AST) -> set[str]:
    """Return the modules of the project that a module or statement imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & FILES.keys()


LAYERS = [  # a module needs only modules of the layers above it
    {"rewards", "assets.common"},
    {"assets.settings", "assets.verdict", "assets.wandb_run"},
    {"assets.resume", "assets.terminal", "assets.evaluate"},
    {"grpo_demo"},
]


def test_which_module_needs_which():
    graph = {name: own_imports(tree) for name, tree in TREES.items()}
    above = set()
    for layer in LAYERS:
        for name in layer:
            assert graph[name] - {"assets.memory", "assets.pass_at_k"} <= above, (
                name
            )  # imported in a function
        above |= layer
    assert graph["grpo_demo"] >= LAYERS[2] | {"rewards"}
    TopologicalSorter(graph).prepare()  # raises CycleError


def needed(name: str) -> set[str]:
    """Return a module and those of the project that importing it imports."""
    found = {name}
    for statement in TREES[name].body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            found |= {other for imported in own_imports(statement) for other in needed(imported)}
    return found


RUN = needed("grpo_demo")


def test_the_code_of_a_run_is_short():
    lines = {name: len(FILES[name].read_text().splitlines()) for name in sorted(RUN)}
    print(sum(lines.values()), lines)
    assert len(lines) <= 9 and sum(lines.values()) <= 2234  # 1,650 is the aim


DIFFERENCES = (ROOT / "assets/notes/differences.md").read_text()
PRIVATE = [
    re.findall(r"`([^`]+)`", line)[:2]
    for line in DIFFERENCES.partition("\n## Private names\n")[2].partition("\n## ")[0].splitlines()
    if line.startswith("| `")
]


def is_there(name: str) -> bool:
    """Return whether a library has a name: `module.Class.attribute`, also one set in a method."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
            break
        except ModuleNotFoundError:
            continue
    else:
        return False
    for part in parts[i:]:
        if not hasattr(found, part):
            fields = getattr(found, "model_fields", {})  # of a pydantic class
            set_in_methods = inspect.isclass(found) and f"self.{part} = " in inspect.getsource(
                found
            )
            return part == parts[-1] and (part in fields or set_in_methods)
        found = getattr(found, part)
    return True


@pytest.mark.parametrize(("name", "file"), PRIVATE, ids=[name for name, _ in PRIVATE])
def test_a_private_name_is_in_the_installed_version(name, file):
    assert is_there(name), f"{name} is gone: {file} needs another way (assets/notes/differences.md)"
    text = next(ROOT.rglob(f"assets/**/{file}"), ROOT / file).read_text()
    assert name.split(".")[-1] in text, f"{file} does not use {name} any more: remove the row"


def test_a_name_that_is_gone_is_seen():
    gone = (
        "trl.GRPOTrainer._log",
        "trl.no_such_module.x",
        "no_such_library.x",
        "wandb.Settings.x_",
    )
    assert not any(map(is_there, gone))


def private_parts(tree: ast.Module) -> set[str]:
    """Return private attributes that a module reads, and private parts of what it imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names |= {*node.module.split("."), *(alias.name for alias in node.names)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_every_private_name_is_in_the_notes():
    listed = {file: set() for _, file in PRIVATE}
    for name, file in PRIVATE:
        listed[file] |= set(name.split("."))
    for module in RUN | {"assets.memory"}:
        file = FILES[module].name
        missing = private_parts(TREES[module]) - listed.get(file, set())
        assert not missing, f"{file} uses {missing}: add it to assets/notes/differences.md"
    assert private_parts(TREES["grpo_demo"]) == set()
    assert len(PRIVATE) >= 10


def test_functions_and_lines_are_short():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        (name, node.name)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and node.end_lineno - node.lineno >= 40
    ]
    assert long == []
    assert max(map(len, Path(ROOT, "grpo_demo.py").read_text().splitlines())) <= 100
