"""Shared by the tests: the project root as working directory and import path, real GSM8K where it is, fast runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update({"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"})
GSM8K = Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared" / "gsm8k"))
needs_gsm8k = pytest.mark.skipif(
    not (GSM8K / "train.jsonl").exists(),
    reason=f"needs the real GSM8K files train.jsonl and test.jsonl: set GSM8K_DIR to their folder (looked in {GSM8K})",
)


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def gsm8k(split: str) -> list[dict]:
    return [json.loads(line) for line in (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def note(fault: str, tried: object, recovered: object, lost: object) -> None:
    """Add a row of README's reliability table to the file named by RELIABILITY, if any."""
    if path := os.environ.get("RELIABILITY"):
        with open(path, "a") as file:
            file.write(json.dumps([fault, tried, recovered, lost]) + "\n")


def run(
    *flags: object, timeout: int = 600, env: dict | None = None, launcher: tuple = ()
) -> subprocess.CompletedProcess:
    """`python grpo_demo.py FLAGS` as a user runs it, in the project root; stdout, stderr and exit status."""
    command = [*(launcher or (sys.executable,)), "grpo_demo.py", *map(str, flags)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_API")} | (env or {})
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=timeout)


def history(file: Path) -> list[dict]:
    """The history rows of one W&B file, read back with `wandb leet inspect --json`."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    return [r["history"]["item"] for r in records if r["type"] == "history"]


def wandb_rows(output_dir: Path) -> list[dict]:
    """The history rows of a run that was never interrupted: it has one W&B file."""
    (file,) = Path(output_dir, "wandb").glob("*run-*/*.wandb")
    return history(file)
