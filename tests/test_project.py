"""The project itself: lint, pins, README, layers and lengths, private names, cards, records."""

import ast
import importlib.metadata
import inspect
import json
import pydoc
import re
import string
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from transformers import Qwen2Config

from assets.research import benchmark, record
from assets.tools import memory
from grpo_demo import parse_args

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("assets/**/*.md"))]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("assets/**/*.py")]
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
# a module needs only modules of the layers before its own
LAYERS = [{"rewards", "assets.settings"}, {"assets.trainer", "assets.watch"}]
LAYERS += [{"assets.resume"}, {"assets.evaluate"}, {"grpo_demo"}]
MEMORY = {"use_peft", "dtype", "bf16", "fp16", "gradient_checkpointing", "use_vllm"}
MEMORY |= {"per_device_train_batch_size", "per_device_eval_batch_size", "steps_per_generation"}
MEMORY |= {"gradient_accumulation_steps", "vllm_gpu_memory_utilization"}
CARDS = sorted((ROOT / "assets/cards").glob("*.yaml"))
DIFFERENCES = (ROOT / "assets/notes/differences.md").read_text(encoding="utf-8")
NAMES = DIFFERENCES.partition("## Private")[2]
PRIVATE = [[a, b] for a, b in re.findall(r"(?m)^\| `([^`]+)` \| `([^`]+)`", NAMES)]


def command(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run Python with these arguments."""
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True)


CHECKS = ["ruff check .", "ruff format --check .", "assets.research.tables --check"]


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_passes(check):
    done = command("-m", *check.split())
    assert done.returncode == 0, done.stdout + done.stderr


def test_pins_are_what_is_installed():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and line[0] != "#"]
    assert any(pin.startswith("trl==") for pin in pins)
    for name, version in (pin.split("==") for pin in pins):
        assert importlib.metadata.version(name).split("+")[0] == version


def test_the_top_level_has_its_agreed_shape_and_ci_runs_readmes_test_command():
    listed = subprocess.check_output(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, text=True)
    top = "grpo_demo.py rewards.py requirements.txt README.md LICENSE assets tests findings"
    assert {name for name in listed.split() if name[0] != "."} <= {*top.split()}
    (line,) = re.findall(r"<!-- tests -->\n```bash\n(.*)\n```", README)
    assert line.endswith("python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests")
    assert "README.md" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_every_logged_metric_is_in_the_glossary():
    lines = (record.RUNS / "laptop-42/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {name for line in lines for name in json.loads(line)} - {"runtime"}
    shown = {re.sub(r"rewards/\w+_reward_func/", "rewards/<name>/", name) for name in logged}
    glossary = (ROOT / "assets/notes/wandb.md").read_text(encoding="utf-8")
    assert "accuracy/strict" in shown
    assert [name for name in shown if f"`train/{name}`" not in glossary] == []


def test_the_pages_are_short_and_every_link_resolves():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 16_000
    assert len(README.partition("python grpo_demo.py --config")[0].split()) <= 300
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    titles = {page: re.findall(r"(?m)^#+ (.*)$", text.lower()) for page, text in texts.items()}
    clean = str.maketrans(" ", "-", string.punctuation.translate({ord("-"): None, ord("_"): None}))
    anchors = {page: {t.translate(clean) for t in titles[page]} for page in PAGES}  # as GitHub's
    for page, text in texts.items():
        assert page == PAGES[0] or len(text.splitlines()) <= 120, page
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            if not file.startswith("http"):
                target = (page.parent / file).resolve() if file else page
                assert target.exists() and (not anchor or anchor in anchors[target]), (page, link)


def test_the_reward_in_readme_works_when_pasted(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = [block for block in blocks if "REWARD_FUNCS.append" in block]
    assert len([line for line in block.splitlines() if line]) <= 4
    parts = re.fullmatch(r"(.*\nREWARD_FUNCS = \[.*?\n\]\n)(.*)", TEXTS["rewards"], re.DOTALL)
    (tmp_path / "rewards.py").write_text(parts[1] + block + parts[2], encoding="utf-8")
    done = command("-I", "-S", "rewards.py", cwd=tmp_path)  # no installed package
    assert done.returncode == 0, done.stderr
    rows = {line[:17].strip(): line[17:].split() for line in done.stdout.splitlines()}
    assert len(rows["gold answer: 18"]) == 7  # six rewards and their sum
    scores = {"perfect": [0.5, 0.5, 0.5, 0.5, 2.0, 0.5, 4.5]}
    scores |= {"plain prose": [0, 0, 0, 0, 0, 0.5, 0.5], "wrong answer": [*[0.5] * 4, 0, 0, 2]}
    assert {title: [float(cell) for cell in rows[title]] for title in scores} == scores


def own_imports(tree: ast.AST) -> set[str]:
    """Return the modules of the project that a module or statement imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & FILES.keys()


def test_a_run_needs_seven_modules_in_layers_and_all_code_is_short():
    run, above = set().union(*LAYERS), {"rewards"}  # whose list the settings check
    tools = {"assets.tools.pass_at_k"}  # imported in a function
    for layer in LAYERS:
        assert all(own_imports(TREES[name]) - tools <= above for name in layer)
        above |= layer
    assert set().union(*(own_imports(TREES[name]) for name in run)) | {"grpo_demo"} == run | tools
    length = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    assert len(run) == 7 and sum(length[name] for name in run) <= 1500
    assert length["grpo_demo"] <= 370
    tests = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py")]
    assert sum(len(text.splitlines()) for text in tests) <= 3000
    assert sum(n for name, n in length.items() if name.startswith("assets.research")) <= 1000
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 40, (name, node.name)


def is_there(name: str) -> bool:
    """Return whether a library has a name: `module.Class.attribute`, also one set in a method."""
    owner, _, part = name.rpartition(".")
    found = pydoc.locate(owner)
    in_class = inspect.isclass(found) and f"self.{part} = " in inspect.getsource(found)
    fields = getattr(found, "model_fields", {})  # of a pydantic class
    return hasattr(found, part) or part in fields or in_class or bool(pydoc.locate(name))


def test_private_names_are_in_the_notes_and_in_the_installed_versions():
    gone = ["trl.GRPOTrainer._log", "trl.no_such.x", "no_such_library.x", "wandb.Settings.x_"]
    assert [name for name, _ in PRIVATE if not is_there(name)] == []
    assert len(PRIVATE) >= 10 and not any(map(is_there, gone))
    for module in set().union(*LAYERS) | {"assets.tools.memory"}:
        used, file = set(), FILES[module].name
        for node in ast.walk(TREES[module]):
            used |= {node.attr} if isinstance(node, ast.Attribute) else set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                used |= set(".".join([getattr(node, "module", ""), *names]).split("."))
        listed = {part for name, where in PRIVATE if where == file for part in name.split(".")}
        private = {name for name in used if name.startswith("_") and not name.startswith("__")}
        assert private <= listed, f"{file}: add {private - listed} to assets/notes/differences.md"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_changes_only_what_memory_needs_and_leaves_a_tenth_free(path):
    """vLLM gets its share of the card; the file and the notes state the estimate.

    In full fine-tuning each layer takes as much: two and three tell of all. With LoRA, few layers
    have their peak in another phase.
    """
    here = ["--use_cpu", "True", "--use_vllm", "False"]  # the tests have no GPU and no vLLM
    args, model_args = parse_args(["--config", str(path), *here])
    card, default = (asdict(a) | asdict(b) for a, b in ((args, model_args), parse_args(here)))
    written, size = path.read_text(encoding="utf-8"), int(path.stem.removesuffix("gb"))
    values = yaml.safe_load(written)
    changed = {name for name in default if card[name] != default[name]} | values.keys()
    assert changed <= MEMORY | ({"learning_rate"} if card["use_peft"] else set())
    assert card["per_device_train_batch_size"] * card["gradient_accumulation_steps"] == 64
    assert (card["generation_batch_size"], card["num_generations"]) == (64, 16)
    own, every = (args.gradient_checkpointing, args.per_device_train_batch_size), 28
    layers, found = [every] if card["use_peft"] else [2, 3], []
    for n in layers:
        config = Qwen2Config(**memory.QWEN | {"num_hidden_layers": n})
        found += memory.peaks(config, args, model_args, *([value] for value in own))
    (*_, few), (*_, more) = found[0], found[-1]
    rest = every - layers[0]
    peak = {phase: few[phase] + rest * (more[phase] - few[phase]) for phase in few}
    vllm = values.get("use_vllm", False) * args.vllm_gpu_memory_utilization * size
    top = max(peak.values()) / 1e9 + vllm
    assert size in memory.CARDS and top <= memory.USABLE * size
    assert re.search(r"Estimated peak: ([\d.]+) GB", written)[1] == f"{top:.1f}"
    notes = (ROOT / "assets/notes/gpu.md").read_text(encoding="utf-8")
    (row,) = [line for line in notes.splitlines() if line.startswith(f"| [`{path.name}`]")]
    assert row.endswith(f"| {top:.1f} | {1 - top / size:.0%} |")


def test_the_benchmark_times_trls_own_trainer():
    seconds, split = benchmark.run("bare", f"{benchmark.LAPTOP} 2")
    assert 0 < split["five rewards"] < split["generate"] < 2 * seconds
