"""README's promises that are code: the reward to paste, the script metadata for uv."""

import re
import subprocess
import sys
import tomllib

from conftest import ROOT


def test_the_reward_in_readme_works_when_pasted(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "REWARD_FUNCS.append" in block]
    assert len([line for line in block.splitlines() if line]) <= 4
    before, after = re.fullmatch(
        r"(.*\nREWARD_FUNCS = \[.*?\n\]\n)(.*)", (ROOT / "rewards.py").read_text(), re.DOTALL
    ).groups()
    (tmp_path / "rewards.py").write_text(before + block + after)
    alone = [sys.executable, "-I", "rewards.py"]
    done = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line[:17].strip(): line[17:].split() for line in done.stdout.splitlines()}
    assert len(rows["gold answer: 18"]) == 7  # six rewards and their sum
    scores = {
        "perfect": [0.5, 0.5, 0.5, 0.5, 2.0, 0.5, 4.5],
        "plain prose": [0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5],
        "wrong answer": [0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 2.0],
    }
    assert {title: [float(cell) for cell in rows[title]] for title in scores} == scores


def test_script_metadata_has_the_requirements():
    """The regular expression is that of PEP 723."""
    block = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (found,) = re.finditer(block, (ROOT / "grpo_demo.py").read_text())
    assert found["type"] == "script"
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", found["content"]))
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    assert metadata["dependencies"] == [pin for pin in pins if pin and pin[0] != "#"]
    assert metadata["requires-python"] == ">=3.11"
