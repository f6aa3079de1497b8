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
import re
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from pathlib import Path

import pandas as pd

RUNS = Path(__file__).resolve().parent / "runs"
PACKAGES = ["torch", "transformers", "trl", "datasets", "peft", "accelerate", "wandb", "vllm"]
# of a run's W&B files: a dict a step; timer -> seconds, in order; command, date, resumed, seconds
Log = namedtuple("Log", "metrics timers started")


def wandb_files(out: Path) -> list[Path]:
    """Return the W&B files of a run, in order: one for each start."""
    return [f for f in sorted(out.glob("wandb/*run-*/*.wandb")) if not f.parent.is_symlink()]


def read_wandb(file: Path) -> tuple[list[dict], dict]:
    """Return the history of a W&B file, a dict a row, and facts: args, started_at, settings."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows, found = [], {"settings": {}}
    for record in map(json.loads, text.splitlines()):
        config = (record.get("run") or record).get("config", {})  # the script's, transformers' own
        found["settings"] |= config.get("update", {})
        if record["type"] == "stats":  # a sample each 15 seconds
            memory = record["stats"]["item"].get("proc.memory.rssMB", 0) * 2**20 / 1e9
            found["peak_memory_gb"] = max(memory, found.get("peak_memory_gb", 0))
        if record["type"] == "history":
            rows.append(record["history"]["item"])
        found = record.get("environment", {}) | found
    return rows, found


def collect(out: Path) -> Log:
    """Return what a run logged, each step once: a killed run repeats steps when it resumes.

    Timers without a later row of metrics are of a step that was cut off, and left out. Offline each
    file has its own clock: `runtime` goes on.
    """
    steps, timed, clock = {}, {}, 0.0  # by global step: the last row, and its timers
    started = {"resumed": len(wandb_files(out)) - 1}
    for file in wandb_files(out):
        rows, facts = read_wandb(file)
        before, waiting = clock if file.parent.name.startswith("offline") else 0.0, []
        for row in rows:
            clock = before + row["_runtime"]
            waiting += [(key, row[key]) for key in row if key.startswith("profiling/")]
            if "train/reward" in row:
                step = row["train/global_step"]
                metrics = {k[6:]: v for k, v in row.items() if k.startswith("train/")}
                steps[step], timed[step], waiting = metrics | {"runtime": clock}, waiting, []
        peak = max(facts.get("peak_memory_gb", 0), started.get("peak_memory_gb", 0))
        started = facts | started | {"peak_memory_gb": round(peak, 2)}
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
        values = timers.get(name, [])
        return sum(values[len(values) // steps :: every]) / (steps - 1)

    logps, losses = "_get_per_token_logps_and_entropies", len(timers["compute_loss"])
    references = len(timers[logps]) - losses  # none with beta 0
    reference = seconds(logps, every=losses // references + 1) if references else 0.0
    policy, loss = seconds(logps) - reference, seconds("compute_loss")
    step_time = sum(m["step_time"] for m in metrics[1:]) / (steps - 1)
    parts = {
        "generate": sum(seconds(name) for name in timers if "generate" in name),
        "five rewards": sum(seconds(name) for name in timers if name.endswith("_reward_func")),
        "reference log-probs": reference,
        "policy log-probs": policy,
        "loss": loss - policy,
        "backward": step_time - seconds("_prepare_inputs") - loss,
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
    """Return ten completions of the first two steps and ten of the last two, right ones too."""
    ends = (*steps[:2], *steps[-2:])
    kept = [row for rows in ends for row in rows[:: max(1, len(rows) // 5)][:5]]
    right = [row for rows in steps for row in rows if row["simple_correctness_reward_func"] == 2]
    if not any(row in right for row in kept[10:]):
        kept[10:15] = right[-5:]
    return kept


def most_varied_group(steps: list[list[dict]]) -> list[dict]:
    """Return the group of the first two steps with the most different rewards."""
    groups = {}
    for row in itertools.chain(*steps[:2]):
        groups.setdefault((row["step"], row["question"]), []).append(row)
    return max(groups.values(), key=lambda group: len({row["advantage"] for row in group}))


def endings(out: Path, steps: list[list[dict]]) -> dict[str, dict[str, int]]:
    """Count what follows the last `</answer>` in the completions of each evaluation and step.

    Named are nothing, a newline, `none` (no `</answer>`) and the four most frequent others.
    """
    files = sorted(out.glob("evaluation/*.parquet"))
    texts = {file.stem: pd.read_parquet(file)["completion"] for file in files}
    texts |= {f"step {rows[0]['step']}": [row["completion"] for row in rows] for rows in steps}
    last = re.compile(r"(?s).*</answer>(.*)")
    tails = {k: [(last.match(x) or ["", "none"])[1] for x in v] for k, v in texts.items()}
    fixed = ["", "\n", "none"]
    often = Counter(tail for found in tails.values() for tail in found if tail not in fixed)
    named = [*fixed, *(tail for tail, _ in often.most_common(4))]
    return {k: dict(Counter(t if t in named else "other" for t in v)) for k, v in tails.items()}


def environment() -> dict:
    """Return what a run's numbers depend on besides its settings: hardware, Python, versions."""
    path = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    hardware = {"cpu": (models or [platform.processor()])[0], "cores": os.cpu_count()}
    listed = subprocess.run("nvidia-smi -L", shell=True, capture_output=True, text=True)
    hardware |= {"gpu": listed.stdout.strip()} if listed.returncode == 0 else {}
    installed = importlib.metadata.distributions()
    versions = {d.name: d.version for d in installed if d.name in PACKAGES}
    return {"hardware": hardware, "python": platform.python_version(), "versions": versions}


def moved(before: Path, after: Path) -> dict[str, float]:
    """Return how far training moved the weights of a model folder: share changed, distance."""
    from safetensors import safe_open

    changed, count, squares, length = 0, 0, 0.0, 0.0
    folders = [safe_open(folder / "model.safetensors", "pt") for folder in (before, after)]
    for name in folders[0].keys():  # noqa: SIM118
        old, new = (folder.get_tensor(name).double() for folder in folders)
        changed, count = changed + (old != new).sum().item(), count + old.numel()
        squares, length = squares + ((new - old) ** 2).sum().item(), length + (old**2).sum().item()
    return {"changed": changed / count, "distance": (squares / length) ** 0.5}


def write_record(out: Path, folder: Path) -> int:
    """Write all files of a record into `folder`; return the number of steps."""
    metrics, timers, started = collect(out)
    record = {
        "command": " ".join(["python grpo_demo.py", *started.get("args", [])]),
        "date": started.get("started_at", "")[:10],
        **environment(),
        **{key: started[key] for key in ("seconds", "peak_memory_gb", "resumed", "settings")},
    }
    model = Path(record["settings"]["model_name_or_path"])
    if all((place / "model.safetensors").exists() for place in (model, out)):
        record["moved"] = moved(model, out)
    steps = [read_completions(file) for file in sorted(out.glob("completions/*.parquet"))]
    files = {"record": record, "samples": samples(steps), "endings": endings(out, steps)}
    files["group"] = most_varied_group(steps)
    texts = {f"{k}.json": json.dumps(v, indent=1, default=str) + "\n" for k, v in files.items()}
    texts["timers.json"] = json.dumps(timers) + "\n"
    texts["metrics.jsonl"] = "".join(json.dumps(m, sort_keys=True) + "\n" for m in metrics)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if (out / "evaluation.json").exists():
        shutil.copy(out / "evaluation.json", folder)
    return len(metrics)


def command_line(text: str) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, formatter_class=raw)


def main() -> None:
    """Run the command line: a finished run's output directory, and a name in runs/."""
    parser = command_line(__doc__)
    parser.add_argument("out", type=Path, help="output directory of a finished run")
    parser.add_argument("name", help="of the record")
    args = parser.parse_args()
    if not wandb_files(args.out) or not list(args.out.glob("completions/*.parquet")):
        parser.error(f"{args.out} is no run with W&B files and completions")
    print(f"{RUNS / args.name}: {write_record(args.out, RUNS / args.name)} steps")


if __name__ == "__main__":
    main()
