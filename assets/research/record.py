"""Keep the record of a finished run: what README's numbers and pictures are made from.

    python -m assets.research.record outputs/tiny-42 laptop-42

writes assets/research/runs/laptop-42, under 1 MB; runs/README.md says what its files are.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pandas as pd

RUNS = Path(__file__).resolve().parent / "runs"
PACKAGES = ["torch", "transformers", "trl", "datasets", "peft", "accelerate", "wandb", "vllm"]


class Log(NamedTuple):
    """What the W&B files of a run say."""

    metrics: list[dict]  # a dict a step
    timers: dict[str, list[float]]  # name -> seconds, in order
    started: dict  # by which command, when, how often resumed, seconds in all


def wandb_files(out: Path) -> list[Path]:
    """Return the W&B files of a run, in order: one for each start."""
    return [f for f in sorted(out.glob("wandb/*run-*/*.wandb")) if not f.parent.is_symlink()]


def read_wandb(file: Path) -> tuple[list[dict], dict]:
    """Return the history of a W&B file, a dict a row, and its environment: args, started_at."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows, environment = [], {}
    for record in map(json.loads, text.splitlines()):
        if record["type"] == "history":
            rows.append(record["history"]["item"])
        environment = record.get("environment", {}) | environment
    return rows, environment


def collect(out: Path) -> Log:
    """Return what a run logged, each step once: a killed run repeats steps when it resumes.

    A step's timers are the rows before that of its metrics. Timers without such a row are those of
    a step that was cut off, and left out. Offline each file has its own clock: `runtime` goes on.
    """
    steps: dict[int, dict] = {}  # the last row of each global step, and its timers
    timed: dict[int, list[tuple[str, float]]] = {}
    started, clock = {"resumed": len(wandb_files(out)) - 1}, 0.0
    for file in wandb_files(out):
        rows, environment = read_wandb(file)
        before = clock if file.parent.name.startswith("offline") else 0.0
        waiting = []  # timers of the step that is not logged yet
        for row in rows:
            clock = before + row["_runtime"]
            waiting += [(key, row[key]) for key in row if key.startswith("profiling/")]
            if "train/reward" in row:
                step = row["train/global_step"]
                metrics = {k: v for k, v in row.items() if k.startswith("train/")}
                steps[step] = {k.removeprefix("train/"): v for k, v in metrics.items()}
                steps[step]["runtime"] = clock
                timed[step], waiting = waiting, []
        started = environment | started
    timers: dict[str, list[float]] = {}
    for key, seconds in itertools.chain(*timed.values()):
        timers.setdefault(key.split("GRPOTrainer.")[1], []).append(round(seconds, 6))
    return Log(list(steps.values()), timers, started | {"seconds": clock})


def time_split(metrics: list[dict], timers: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean seconds of each part of a step, without the first step.

    Together they are the time from one log line to the next. TRL's timers do not cover backward: it
    is what `step_time` has besides `_prepare_inputs` and `compute_loss`. The reference's log-probs
    are timed once a generation, before those of the policy, once a micro-batch.
    """
    steps = len(metrics)

    def seconds(name: str, every: int = 1) -> float:
        """Return a step's seconds of a timer, or of every `every`-th entry."""
        values = timers.get(name, [])
        return sum(values[len(values) // steps :: every]) / (steps - 1)

    generate = sum(seconds(name) for name in timers if "generate" in name)
    logps, losses = "_get_per_token_logps_and_entropies", len(timers["compute_loss"])
    references = len(timers[logps]) - losses  # none with beta 0
    reference = seconds(logps, every=losses // references + 1) if references else 0.0
    policy = seconds(logps) - reference
    step_time = sum(m["step_time"] for m in metrics[1:]) / (steps - 1)
    parts = {
        "generate": generate,
        "five rewards": sum(seconds(name) for name in timers if name.endswith("_reward_func")),
        "reference log-probs": reference,
        "policy log-probs": policy,
        "loss": seconds("compute_loss") - policy,
        "backward": step_time - seconds("_prepare_inputs") - seconds("compute_loss"),
    }
    whole = (metrics[-1]["runtime"] - metrics[0]["runtime"]) / (steps - 1)
    return parts | {"optimizer and the rest": whole - sum(parts.values())}


def read_completions(file: Path) -> list[dict]:
    """Return a step's completions: question, completion, gold, extracted, rewards, advantage."""
    rows = []
    for row in pd.read_parquet(file).to_dict("records"):
        row["question"] = row.pop("prompt")[-1]["content"]
        row["completion"] = row["completion"][0]["content"]
        row.pop("text", None)
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def samples(steps: list[list[dict]]) -> list[dict]:
    """Return ten completions of the first two steps and ten of the last two.

    If none of the last ten is right, the run's last five right ones replace five of them.
    """
    kept = []
    for rows in (*steps[:2], *steps[-2:]):
        kept += rows[:: max(1, len(rows) // 5)][:5]
    right = [row for rows in steps for row in rows if row["simple_correctness_reward_func"] == 2]
    if not any(row in right for row in kept[10:]):
        kept[10:15] = right[-5:]
    return kept


def most_varied_group(steps: list[list[dict]]) -> list[dict]:
    """Return the group of the first two steps with the most different rewards."""
    groups = []
    for rows in steps[:2]:
        by_question = itertools.groupby(rows, key=lambda row: row["question"])
        groups += [list(group) for _, group in by_question]
    return max(groups, key=lambda group: len({row["advantage"] for row in group}))


def ending(text: str) -> str:
    """Return what follows the last `</answer>`; `none` if there is no such tag."""
    tail = text.rpartition("</answer>")[2] if "</answer>" in text else "none"
    only = tail.endswith("</reasoning>") and text.count("</reasoning>") == 1
    return f"{tail} (the only one)" if only else tail


def endings(out: Path, steps: list[list[dict]]) -> dict[str, dict[str, int]]:
    """Count how the completions of each evaluation and of each step end.

    Named are nothing, the newline that the format asks for, the four most frequent endings, and
    `none` (no `</answer>`); the rest is `other`.
    """
    tails = {}
    for file in sorted(out.glob("evaluation/*.parquet")):
        tails[file.stem] = [ending(text) for text in pd.read_parquet(file)["completion"]]
    for rows in steps:
        tails[f"step {rows[0]['step']}"] = [ending(row["completion"]) for row in rows]
    fixed = ["", "\n", "none"]
    often = Counter(tail for found in tails.values() for tail in found if tail not in fixed)
    named = [*fixed, *(tail for tail, _ in often.most_common(4))]
    return {k: dict(Counter(t if t in named else "other" for t in v)) for k, v in tails.items()}


def environment() -> dict:
    """Return what a run's numbers depend on besides its settings: hardware, Python, versions."""
    path = Path("/proc/cpuinfo")
    info = path.read_text().splitlines() if path.exists() else []
    models = [line.split(": ")[1] for line in info if line.startswith("model name")]
    hardware = {"cpu": (models or [platform.processor()])[0], "cores": os.cpu_count()}
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        hardware |= {"gpu": listed.stdout.strip()} if listed.returncode == 0 else {}
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {"hardware": hardware, "python": platform.python_version(), "versions": versions}


def write_record(out: Path, folder: Path) -> int:
    """Write all files of a record into `folder`; return the number of steps."""
    metrics, timers, started = collect(out)
    record = {
        "command": " ".join(["python grpo_demo.py", *started.get("args", [])]),
        "date": started.get("started_at", "")[:10],
        **environment(),
        "seconds": started["seconds"],
        "resumed": started["resumed"],
        "settings": json.loads((out / "run.json").read_text())["settings"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [json.dumps(step, sort_keys=True) + "\n" for step in metrics]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "timers.json").write_text(json.dumps(timers) + "\n")
    if (out / "evaluation.json").exists():
        shutil.copy(out / "evaluation.json", folder)
    steps = [read_completions(file) for file in sorted(out.glob("completions/*.parquet"))]
    texts = {"samples": samples(steps), "group": most_varied_group(steps)}
    for name, rows in (texts | {"endings": endings(out, steps)}).items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1, default=str) + "\n")
    return len(metrics)


def main() -> None:
    """Run the command line: a finished run's output directory, and a name in runs/."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=Path, help="output directory of a finished run")
    parser.add_argument("name", help="of the record")
    args = parser.parse_args()
    if not wandb_files(args.out) or not list(args.out.glob("completions/*.parquet")):
        parser.error(f"{args.out} is no run with W&B files and completions")
    steps = write_record(args.out, RUNS / args.name)
    size = sum(file.stat().st_size for file in (RUNS / args.name).iterdir()) / 1e3
    print(RUNS / args.name, f"{size:.0f} kB, {steps} steps")


if __name__ == "__main__":
    main()
