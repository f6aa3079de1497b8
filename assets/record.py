"""Keep the record of a finished run: what README's numbers and pictures are made from.

    python assets/record.py outputs/tiny laptop-42      # writes assets/runs/laptop-42, well under 1 MB

`record.json` (command, versions, hardware, settings), `metrics.jsonl` (a line a step), `timers.json` (W&B's profiling
timers, seconds, one list a name), `evaluation.json`, `samples.json` (20 early and late completions, their rewards),
`group.json` (all completions of one prompt), `endings.json` (what follows the last `</answer>`, how often).
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


def history(out: Path) -> tuple[list[dict], dict]:
    """All W&B history rows of a run, and how it was started (command line, date, resumed), from its local files.

    A run that was stopped and went on has several files. Offline each has a clock of its own: here `_runtime` goes on.
    """
    files = [file for file in sorted(out.glob("wandb/*run-*/*.wandb")) if not file.parent.is_symlink()]
    rows, started = [], {"resumed": len(files) - 1}
    for file in files:
        before = rows[-1]["_runtime"] if rows and file.parent.name.startswith("offline") else 0.0
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            record = json.loads(line)
            if record["type"] == "history":
                row = record["history"]["item"]
                rows.append(row | {"_runtime": row["_runtime"] + before})
            started = record.get("environment", {}) | started
    return rows, started


def samples(out: Path) -> tuple[list[dict], list[dict]]:
    """Ten completions of the first two steps and ten of the last two, with rewards and advantage; and a whole group.

    Where none of the last ten is right, the last five that were take the place of five of them. The group is the one of
    the first two steps with the most different rewards.
    """

    def read(file: Path) -> list[dict]:
        rows = []
        for row in pd.read_parquet(file).to_dict("records"):
            row |= {"question": row.pop("prompt")[-1]["content"], "completion": row["completion"][0]["content"]}
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        return rows

    def right(row: dict) -> bool:
        return row["simple_correctness_reward_func"] == 2

    steps = [read(file) for file in sorted(out.glob("completions/*.parquet"))]
    kept = [row for rows in [*steps[:2], *steps[-2:]] for row in rows[:: max(1, len(rows) // 5)][:5]]
    if not any(map(right, kept[10:])):
        kept[10:15] = [row for rows in steps for row in rows if right(row)][-5:]
    groups = [
        list(group) for rows in steps[:2] for _, group in itertools.groupby(rows, key=lambda row: row["question"])
    ]
    return kept, max(groups, key=lambda group: len({row["advantage"] for row in group}))


def ending(text: str) -> str:
    """What follows the last `</answer>`; `none` where there is no such tag."""
    tail = text.rpartition("</answer>")[2] if "</answer>" in text else "none"
    return f"{tail} (the only one)" if tail.endswith("</reasoning>") and text.count("</reasoning>") == 1 else tail


def endings(out: Path) -> dict[str, dict[str, int]]:
    """How often the completions of each step, and of each evaluation, end in what.

    Named are nothing, the newline that the format asks for, and the four most frequent; the rest is `other`, and
    `none` are completions without `</answer>`.
    """
    texts = {file.stem: pd.read_parquet(file)["completion"] for file in sorted(out.glob("evaluation/*.parquet"))}
    for file in sorted(out.glob("completions/*.parquet")):
        rows = pd.read_parquet(file)
        texts[f"step {rows['step'][0]}"] = rows["completion"].map(lambda message: message[0]["content"])
    tails = {key: column.map(ending) for key, column in texts.items()}
    often = Counter(tail for column in tails.values() for tail in column if tail not in ("", "\n", "none"))
    named = ["", "\n", *(tail for tail, _ in often.most_common(4)), "none"]
    return {k: dict(Counter(tail if tail in named else "other" for tail in v)) for k, v in tails.items()}


def environment() -> dict:
    """What a run's numbers depend on beside its settings: processor, Python, versions."""
    packages = ["torch", "transformers", "trl", "datasets", "peft", "accelerate", "wandb"]
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    gpu = shutil.which("nvidia-smi") and subprocess.check_output(["nvidia-smi", "-L"], text=True).strip()
    name = next(
        (line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), platform.processor()
    )
    return {
        "hardware": {"cpu": name, "cores": os.cpu_count()} | ({"gpu": gpu} if gpu else {}),
        "python": platform.python_version(),
        "versions": {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages},
    }


def collect(out: Path) -> tuple[list[dict], dict[str, list[float]], dict]:
    """A run's metrics (a dictionary a step), timers (seconds, a list a name, in order) and how it was started."""
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
    """Mean seconds of each part of a step, without the first one; together the time from one log line to the next.

    TRL's timers do not cover backward: it is what `step_time` has beside `_prepare_inputs` and `compute_loss`. The
    reference's log-probs are timed once a generation, before those of the policy, once a micro-batch.
    """
    steps = len(metrics)

    def seconds(name: str, every: int = 1) -> float:
        """A step's seconds of a timer; with `every`, of its first entry and of each that comes so many later."""
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
        "optimizer": seconds("optimizer"),
    }
    whole = (metrics[-1]["runtime"] - metrics[0]["runtime"]) / (steps - 1)
    return parts | {"the rest": whole - sum(parts.values())}


def main() -> None:
    out, folder = Path(sys.argv[1]), RUNS / sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    metrics, timers, started = collect(out)
    run = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {"settings": {}}
    record = {
        "command": "python grpo_demo.py " + " ".join(started.get("args", [])),
        "date": started.get("started_at", "")[:10],
        **environment(),
        "seconds": started["seconds"],
        "resumed": started["resumed"],
        "settings": run["settings"],
    }
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m, sort_keys=True) + "\n" for m in metrics))
    (folder / "timers.json").write_text(json.dumps(timers) + "\n")
    if (out / "evaluation.json").exists():
        shutil.copy(out / "evaluation.json", folder)
    for name, rows in zip(("samples", "group", "endings"), (*samples(out), endings(out)), strict=True):
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1, default=str) + "\n")
    print(folder, f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB, {len(metrics)} steps")


if __name__ == "__main__":
    main()
