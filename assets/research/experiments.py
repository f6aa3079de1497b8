"""Run the laptop run with one thing changed, three seeds each; write a line a run.

    python -m assets.research.experiments settings    # learning rates: other seeds, other questions
    python -m assets.research.experiments parts       # one part changed, on the test questions
    python -m assets.research.experiments updates     # six steps in fp32 and bf16
    python -m assets.research.experiments stops       # right and wrong stop tokens

experiments.yaml says what is changed. Each writes runs/<name>.jsonl and skips the runs that are
there already. There are as many runs at a time as cores, each with one thread.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import yaml

from assets.research.record import RUNS, command_line, environment, moved
from assets.research.tables import ROOT, read_lines

TINY = ROOT / "assets/tiny"
HARD_SHARE = 0.400  # of the committed questions, as assets/tools/make.py chose it
CURVES = "rewards/soft_format_reward_func/mean rewards/strict_format_reward_func/mean kl "
CURVES += "accuracy/strict accuracy/lenient frac_reward_zero_std completions/mean_length"


def run_one(name: str, flags: str, seed: int, data: str, models: str) -> dict:
    """Do one laptop run of 60 steps of 64 completions; return its line of the file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = "grpo_demo.py --config assets/tiny/config.yaml --max_steps 60 --save_steps 60 "
        command += f"--seed {seed} --output_dir {out} --dataset_name {data} --report_to none "
        command += f"--log_completions False --disable_tqdm True {flags.format(models=models)}"
        single = os.environ | {"OMP_NUM_THREADS": "1"}
        argv = [sys.executable, *command.split()]  # of a flag given twice, the last one counts
        done = subprocess.run(argv, cwd=ROOT, env=single, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}, seed {seed}: exit {done.returncode}\n{done.stderr[-2000:]}")
        (state,) = out.glob("checkpoint-*/trainer_state.json")
        log = [step for step in json.loads(state.read_text())["log_history"] if "reward" in step]
        evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        weights = moved(TINY, out)
    measured = evaluation["measurements"]
    return {
        **{"change": name, "flags": flags, "seed": seed, "date": str(date.today())},
        **environment(),
        **{"moved": weights, "verdict": evaluation["verdict"], "gain": evaluation["gain"]},
        "measured": {k: {c: v[c]["value"] for c in v} for k, v in measured.items()},
        # without beta there is no kl
        "curve": {key: [round(step.get(key, 0.0), 4) for step in log] for key in CURVES.split()},
    }


def write_data(folder: Path) -> None:
    """Write validation questions, in no committed file, and a model with another end token."""
    from assets.tools.make import write_rows

    shutil.copy(TINY / "train.jsonl", folder)
    write_rows(folder / "test.jsonl", "validation", 512, HARD_SHARE, seed=7)
    shutil.copytree(TINY, folder / "endless")
    key = {"tokenizer_config": ("eos_token", "<|endoftext|>")}
    for name in ("tokenizer_config", "generation_config", "config"):
        file, change = folder / f"endless/{name}.json", key.get(name, ("eos_token_id", 0))
        file.write_text(json.dumps(json.loads(file.read_text()) | dict([change])))


def main() -> None:
    """Run the command line: the runs of one kind that are not in its file yet."""
    kinds = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    parser = command_line(__doc__)
    parser.add_argument("kind", choices=kinds)
    kind = parser.parse_args().kind
    changes, seeds = kinds[kind]["changes"], kinds[kind]["seeds"]
    path = RUNS / f"{kind}.jsonl"
    path.touch()
    there = {(row["change"], row["seed"]) for row in read_lines(path.name)}
    jobs = [(name, changes[name], seed) for seed in seeds for name in changes]
    jobs = [job for job in jobs if (job[0], job[2]) not in there]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        write_data(Path(folder))
        data = folder if kind == "settings" else "assets/tiny"
        # in the order of the table, whichever ends first
        for row in pool.map(lambda job: run_one(*job, data, folder), jobs):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            after = row["measured"]["after_zero_shot"]
            print(row["change"], row["seed"], row["verdict"], after, flush=True)


if __name__ == "__main__":
    main()
