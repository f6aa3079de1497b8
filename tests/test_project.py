"""The project itself: lint, pins, README's commands."""

import importlib.metadata
import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_ruff_is_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_requirements_are_pinned_to_what_is_installed():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == 7
    for line in lines:
        name, version = line.split("==")
        assert importlib.metadata.version(name).split("+")[0] == version


def test_the_top_level_has_its_agreed_shape():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert top <= {"grpo_demo.py", "rewards.py", "requirements.txt", "assets", "README.md", "tests", "LICENSE"}


def test_ci_runs_readmes_test_command():
    (command,) = re.findall(r"<!-- tests -->\n```bash\n(.*)\n```", README)
    assert command.endswith("python -m pytest -q tests") and "README.md" in (ROOT / ".ci/run").read_text()


def test_every_logged_metric_is_in_the_glossary():
    lines = (ROOT / "assets/runs/laptop-42/metrics.jsonl").read_text().splitlines()
    names = {name for line in lines for name in re.findall(r'"([a-z_]+(?:/[a-z_]+)*)": ', line)}
    glossary = README[README.index("## In W&B") : README.index("## Reliability")]
    shown = {re.sub(r"rewards/\w+_reward_func/", "rewards/<name>/", name) for name in names - {"runtime"}}
    assert len(shown) == 30 and [name for name in shown if f"`train/{name}`" not in glossary] == []
