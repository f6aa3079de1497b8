"""Keep the record of a finished run: what README's numbers and pictures are made from.

    python assets/record.py outputs/tiny-42 laptop-42   # writes assets/runs/laptop-42, under 1 MB

record.json      command, date, versions, hardware, settings
metrics.jsonl    a line a step
timers.json      W&B's profiling timers, in seconds: a list a name
evaluation.json  as the run wrote it
samples.json     20 early and late completions with their rewards
group.json       all completions of one prompt
endings.json     what follows the last `</answer>`, how often
"""

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

import pandas as pd

RUNS = Path(__file__).resolve().parent / "runs"
PACKAGES = ["torch", "transformers", "trl", "datasets", "peft", "accelerate", "wandb", "vllm"]


def history(out: Path) -> tuple[list[dict], dict]:
    """Return the rows of a run's W&B files, and how it was started (command, date, resumed).

    A resumed run has several files. Offline each has its own clock: here `_runtime` goes on.
    """
    files = [f for f in sorted(out.glob("wandb/*run-*/*.wandb")) if not f.parent.is_symlink()]
    rows, started = [], {"resumed": len(files) - 1}
    for file in files:
        offline = file.parent.name.startswith("offline")
        before = rows[-1]["_runtime"] if rows and offline else 0.0
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for record in map(json.loads, text.splitlines()):
            if record["type"] == "history":
                row = record["history"]["item"]
                rows.append(row | {"_runtime": row["_runtime"] + before})
            started = record.get("environment", {}) | started
    return rows, started


def read_completions(file: Path) -> list[dict]:
    """Return the completions of a step: question, completion, rewards, advantage."""
    rows = []
    for row in pd.read_parquet(file).to_dict("records"):
        row["question"] = row.pop("prompt")[-1]["content"]
        row["completion"] = row["completion"][0]["content"]
        row.pop("text", None)
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def samples(out: Path) -> tuple[list[dict], list[dict]]:
    """Return ten completions of the first two steps and ten of the last two; and a whole group.

    If none of the last ten is right, the run's last five right ones replace five of them. The group
    is the one of the first two steps with the most different rewards.
    """

    def right(row: dict) -> bool:
        return row["simple_correctness_reward_func"] == 2

    steps = [read_completions(file) for file in sorted(out.glob("completions/*.parquet"))]
    ends = [*steps[:2], *steps[-2:]]
    kept = [row for rows in ends for row in rows[:: max(1, len(rows) // 5)][:5]]
    if not any(map(right, kept[10:])):
        kept[10:15] = [row for rows in steps for row in rows if right(row)][-5:]
    groups = [
        list(group)
        for rows in steps[:2]
        for _, group in itertools.groupby(rows, key=lambda row: row["question"])
    ]
    return kept, max(groups, key=lambda group: len({row["advantage"] for row in group}))


def ending(text: str) -> str:
    """Return what follows the last `</answer>`; `none` if there is no such tag."""
    tail = text.rpartition("</answer>")[2] if "</answer>" in text else "none"
    only = tail.endswith("</reasoning>") and text.count("</reasoning>") == 1
    return f"{tail} (the only one)" if only else tail


def endings(out: Path) -> dict[str, dict[str, int]]:
    """Count how the completions of each step and of each evaluation end.

    Named are nothing, the newline that the format asks for, the four most frequent endings, and
    `none` (no `</answer>`); the rest is `other`.
    """
    files = sorted(out.glob("evaluation/*.parquet"))
    texts = {file.stem: pd.read_parquet(file)["completion"] for file in files}
    for file in sorted(out.glob("completions/*.parquet")):
        rows = pd.read_parquet(file)
        texts[f"step {rows['step'][0]}"] = rows["completion"].map(lambda c: c[0]["content"])
    tails = {key: column.map(ending) for key, column in texts.items()}
    fixed = ["", "\n", "none"]
    often = Counter(tail for column in tails.values() for tail in column if tail not in fixed)
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


def collect(out: Path) -> tuple[list[dict], dict[str, list[float]], dict]:
    """Return a run's metrics (a dict a step), timers (seconds, in order) and how it was started."""
    rows, started = history(out)
    metrics, timers = [], {}
    for row in rows:
        if "train/reward" in row:
            step = {k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/")}
            metrics.append(step | {"runtime": row["_runtime"]})
        for name, value in row.items():
            if name.startswith("profiling/"):
                timers.setdefault(name.split("GRPOTrainer.")[1], []).append(round(value, 6))
    started["seconds"] = rows[-1]["_runtime"]
    return metrics, timers, started


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


def write_record(out: Path, folder: Path) -> int:
    """Write all files of a record into `folder`; return the number of steps."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics, timers, started = collect(out)
    record = {
        "command": " ".join(["python grpo_demo.py", *started.get("args", [])]),
        "date": started.get("started_at", "")[:10],
        **environment(),
        "seconds": started["seconds"],
        "resumed": started["resumed"],
        "settings": json.loads((out / "run.json").read_text())["settings"],
    }
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [json.dumps(step, sort_keys=True) + "\n" for step in metrics]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "timers.json").write_text(json.dumps(timers) + "\n")
    if (out / "evaluation.json").exists():
        shutil.copy(out / "evaluation.json", folder)
    for name, rows in zip(
        ("samples", "group", "endings"), (*samples(out), endings(out)), strict=True
    ):
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1, default=str) + "\n")
    return len(metrics)


def main() -> None:
    """Run the command line: a finished run's output directory, and a name in assets/runs."""
    if len(sys.argv) != 3:
        sys.exit("usage: python assets/record.py OUTPUT_DIR NAME")
    out, folder = Path(sys.argv[1]), RUNS / sys.argv[2]
    steps = write_record(out, folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e3
    print(folder, f"{size:.0f} kB, {steps} steps")


if __name__ == "__main__":
    main()
