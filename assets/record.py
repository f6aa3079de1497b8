"""Keep the record of a finished run: what README's numbers and pictures are made from.

    python assets/record.py outputs/tiny laptop-42      # writes assets/runs/laptop-42, well under 1 MB

`record.json` (command, versions, hardware, settings), `metrics.jsonl` (a line a step), `timers.json` (W&B's profiling
timers, seconds, one list a name), `evaluation.json`, `samples.json` (20 early and late completions, their rewards).
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

RUNS = Path(__file__).resolve().parent / "runs"


def history(out: Path) -> tuple[list[dict], dict]:
    """All W&B history rows of a run, and how it was started (command line, date), from its local files."""
    rows, started = [], {}
    for file in sorted(out.glob("wandb/*run-*/*.wandb")):
        if file.parent.is_symlink():
            continue
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            record = json.loads(line)
            if record["type"] == "history":
                rows.append(record["history"]["item"])
            started |= record.get("environment", {})
    return rows, started


def samples(out: Path) -> list[dict]:
    """Ten completions of the first two steps and ten of the last two, one a group, with rewards and advantage."""
    files = sorted(out.glob("completions/*.parquet"))
    kept = []
    for file in [*files[:2], *files[-2:]]:
        for row in pd.read_parquet(file).iloc[:: 64 // 5].head(5).to_dict("records"):
            row |= {"question": row.pop("prompt")[-1]["content"], "completion": row["completion"][0]["content"]}
            kept.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return kept


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
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    out, folder = Path(sys.argv[1]), RUNS / sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    rows, started = history(out)
    steps = [row for row in rows if "train/reward" in row]
    metrics = [{k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/")} for row in steps]
    timers: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("profiling/"):
                timers.setdefault(name.split("GRPOTrainer.")[1], []).append(round(value, 6))
    run = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {"settings": {}}
    record = {
        "command": "python grpo_demo.py " + " ".join(started.get("args", [])),
        "date": started.get("started_at", "")[:10],
        **environment(),
        "seconds": max(row["_runtime"] for row in rows),
        "settings": run["settings"],
    }
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m, sort_keys=True) + "\n" for m in metrics))
    (folder / "timers.json").write_text(json.dumps(timers) + "\n")
    (folder / "evaluation.json").write_text((out / "evaluation.json").read_text())
    (folder / "samples.json").write_text(json.dumps(samples(out), indent=1, default=str) + "\n")
    print(folder, f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB, {len(metrics)} steps")


if __name__ == "__main__":
    main()
