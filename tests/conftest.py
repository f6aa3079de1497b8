"""Shared by the tests: the script run in a forked child or as a command, W&B files, real GSM8K."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
os.environ["OMP_NUM_THREADS"] = "1"  # all runs are small; two at a time do not disturb each other
GSM8K = Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared" / "gsm8k"))
why = f"needs the real GSM8K files: set GSM8K_DIR to their folder (looked in {GSM8K})"
needs_gsm8k = pytest.mark.skipif(not (GSM8K / "train.jsonl").exists(), reason=why)
LAPTOP = ("--config", "assets/tiny/config.yaml")
TWO = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
TWO = (*TWO, "--main_process_port", "0")
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:  # as if pytest runs in the background
        signal.signal(number, signal.SIG_DFL)
FORKS = multiprocessing.get_context("forkserver")  # one import, a fork for each run
FORKS.set_forkserver_preload(["grpo_demo"])


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def gsm8k(split: str, folder: Path = GSM8K) -> list[dict]:
    text = (folder / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def child(argv: list[str], env: dict[str, str], logs: list[str]) -> None:
    """Run `main(argv)` in a forked process."""
    os.environ.clear()
    os.environ.update(env)
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["grpo_demo.py", *argv]
    import grpo_demo

    grpo_demo.main(argv)


class Job:
    """A run of the script in the background, in a forked child."""

    def __init__(self, *flags: object, env: dict | None = None):
        self.folder = tempfile.TemporaryDirectory()  # gone with the job
        self.logs = [f"{self.folder.name}/{name}" for name in ("out", "err")]
        for path in self.logs:
            Path(path).touch()
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_API")}
        env = {k: v for k, v in (clean | (env or {})).items() if v is not None}
        arguments = ([*map(str, flags)], env, self.logs)
        self.process = FORKS.Process(target=child, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def alive(self) -> bool:
        return self.process.is_alive()

    def wait(self, timeout: int = 300) -> SimpleNamespace:
        """Wait for the end: returncode (negative: killed by that signal), stdout, stderr."""
        self.process.join(timeout)
        if late := self.alive():
            self.process.kill()
        assert not late, f"still running: {Path(self.logs[1]).read_text()[-2000:]}"
        out, err = (Path(log).read_text() for log in self.logs)
        return SimpleNamespace(returncode=self.process.exitcode, stdout=out, stderr=err)


def run(*flags: object, **options: object) -> SimpleNamespace:
    """Run `python grpo_demo.py FLAGS` in a forked child: stdout, stderr and exit status."""
    return Job(*flags, **options).wait()


def command(*flags: object, env: dict | None = None, launcher: tuple = (sys.executable,)):
    """Run the real command as a user does, in a new Python, in the project's root."""
    argv = [*launcher, "grpo_demo.py", *map(str, flags)]
    env = os.environ | (env or {})
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def inspect(file: Path) -> list[dict]:
    """Return the records of one W&B file, read back with `wandb leet inspect --json`."""
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(leet, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def wandb_rows(output_dir: Path) -> list[dict]:
    """Return the history rows of a run that was never interrupted: it has one W&B file."""
    (file,) = Path(output_dir, "wandb").glob("*run-*/*.wandb")
    return [r["history"]["item"] for r in inspect(file) if r["type"] == "history"]


def series(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]
