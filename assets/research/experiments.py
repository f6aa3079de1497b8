"""Run the laptop run with one thing changed, three seeds each; write a line a run.

    python -m assets.research.experiments settings    # learning rates: other seeds, other questions
    python -m assets.research.experiments parts       # one part changed, on the test questions
    python -m assets.research.experiments updates     # six steps in fp32 and bf16
    python -m assets.research.experiments stops       # right and wrong stop tokens

Each writes runs/<name>.jsonl and skips the runs that are there already. There are as many runs at a
time as cores, each with one thread: a minute for two runs on two cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from assets.research.record import RUNS, environment, moved
from assets.research.tables import ROOT, read_lines

TINY = ROOT / "assets/tiny"
# The rule: the smallest rate with which each seed has learned the format, a mean strict format
# reward of 0.42 of 0.5 over the last ten steps. A larger rate only costs accuracy.
RATES = ["1e-4", "1.4e-4", "2e-4", "2.8e-4", "4e-4"]
SETTINGS = {f"learning rate {rate}": f"--learning_rate {rate}" for rate in RATES}
PARTS = {
    "nothing changed": "",
    "without xmlcount": "--reward_weights 0 1 1 1 1",
    "without soft format": "--reward_weights 1 0 1 1 1",
    "without strict format": "--reward_weights 1 1 0 1 1",
    "without int": "--reward_weights 1 1 1 0 1",
    "without correctness": "--reward_weights 1 1 1 1 0",
    "soft and strict format only": "--reward_weights 0 1 1 0 0",
    "correctness only": "--reward_weights 0 0 0 0 1",
    "beta 0: no KL": "--beta 0",
    "groups of 2": "--num_generations 2",
    "groups of 4": "--num_generations 4",
    "groups of 16": "--num_generations 16",
    "loss dr_grpo, rewards not scaled": "--loss_type dr_grpo --scale_rewards none",
    "loss dapo": "--loss_type dapo",
    "scored at the sampling temperature": "--temperature 0.9",
}
SIX = "--max_steps 6 --save_steps 6"
UPDATES = {
    f"{dtype}, learning rate {rate}": f"--dtype {dtype} --learning_rate {rate} {SIX}"
    for rate in ("5e-6", "2.8e-4")
    for dtype in ("float32", "bfloat16")
}
STOPS = {
    "stops where the model ends its text": "",
    "does not stop there": "--model_name_or_path {folder}/endless",
}
KINDS = {  # what is changed, seeds
    "settings": (SETTINGS, [3, 4, 5]),
    "parts": (PARTS, [42, 1, 2]),
    "updates": (UPDATES, [42, 1, 2]),
    "stops": (STOPS, [42, 1, 2]),
}
HARD_SHARE = 0.400  # of the committed questions, as assets/tiny/make.py chose it
CURVES = [
    "rewards/soft_format_reward_func/mean",
    "rewards/strict_format_reward_func/mean",
    "accuracy/strict",
    "accuracy/lenient",
    "frac_reward_zero_std",
    "kl",
    "completions/mean_length",
]


def run_one(name: str, flags: str, seed: int, data: str, models: str) -> dict:
    """Do one laptop run of 60 steps of 64 completions; return its line of the file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [sys.executable, "grpo_demo.py", "--config", "assets/tiny/config.yaml"]
        command += ["--max_steps", "60", "--save_steps", "60", "--seed", str(seed)]
        command += ["--output_dir", str(out), "--dataset_name", data]
        command += flags.format(folder=models).split()
        command += ["--report_to", "none", "--log_completions", "False", "--disable_tqdm", "True"]
        single = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=single, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}: exit {done.returncode}\n{done.stderr[-2000:]}")
        (state,) = out.glob("checkpoint-*/trainer_state.json")
        log = [step for step in json.loads(state.read_text())["log_history"] if "reward" in step]
        evaluation = json.loads((out / "evaluation.json").read_text())
        weights_moved = moved(TINY, out)
    measured = evaluation["measurements"]
    return {
        "change": name,
        "flags": flags,
        "seed": seed,
        "date": str(date.today()),
        **environment(),
        "moved": weights_moved,
        "verdict": evaluation["verdict"],
        "gain": evaluation["gain"],
        "measured": {k: {c: v[c]["value"] for c in v} for k, v in measured.items()},
        # without beta there is no kl
        "curve": {key: [round(step.get(key, 0.0), 4) for step in log] for key in CURVES},
    }


def write_validation(folder: Path) -> None:
    """Write a dataset whose test questions are validation questions, in no committed file."""
    from assets.tiny.make import write_rows

    (folder / "train.jsonl").write_bytes((TINY / "train.jsonl").read_bytes())
    write_rows(folder / "test.jsonl", "validation", 512, HARD_SHARE, seed=7)


def write_endless_model(folder: Path) -> None:
    """Write the embedded model with another end token than the one with which it ends its text."""
    shutil.copytree(TINY, folder)
    texts = {"tokenizer_config": "<|endoftext|>", "generation_config": 0, "config": 0}
    for name, token in texts.items():
        file = folder / f"{name}.json"
        key = "eos_token" if isinstance(token, str) else "eos_token_id"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: token}))


def main() -> None:
    """Run the command line: the runs of one kind that are not in its file yet."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("kind", choices=KINDS)
    kind = parser.parse_args().kind
    changes, seeds = KINDS[kind]
    path = RUNS / f"{kind}.jsonl"
    path.touch()
    there = {(row["change"], row["seed"]) for row in read_lines(path.name)}
    wanted = [(name, flags, seed) for seed in seeds for name, flags in changes.items()]
    missing = [job for job in wanted if (job[0], job[2]) not in there]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        write_validation(Path(folder))
        write_endless_model(Path(folder, "endless"))
        data = folder if kind == "settings" else "assets/tiny"
        # in the order of the table, whichever ends first
        for row in pool.map(lambda job: run_one(*job, data, folder), missing):
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            after = row["measured"]["after_zero_shot"]
            print(row["change"], row["seed"], row["verdict"], after, flush=True)


if __name__ == "__main__":
    main()
