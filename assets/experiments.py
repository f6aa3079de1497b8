"""What each part of the recipe does: the laptop run with one thing changed, three seeds each, a line a run.

    python assets/experiments.py settings    # which learning rate: other seeds, other questions than the test questions
    python assets/experiments.py parts       # one part changed at a time, measured on the test questions
    python assets/experiments.py updates     # six steps in fp32 and in bf16: how far the weights move

They write assets/runs/<name>.jsonl, a line a run, and pass over a run that is there already. As many runs at a time as
there are cores, each with one thread: about two minutes for two runs on two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from record import environment  # noqa: E402

RATES = ["5e-5", "1e-4", "2e-4", "4e-4"]
# The smallest rate is chosen with which each seed has learned the format: a mean strict format reward of 0.42 of 0.5
# over the last ten steps. A larger one only costs accuracy.
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
UPDATES = {
    f"{dtype}, learning rate {rate}": f"--dtype {dtype} --learning_rate {rate} --max_steps 6 --save_steps 6"
    for rate in ("5e-6", "2e-4")
    for dtype in ("float32", "bfloat16")
}
HARD_SHARE = 0.908  # of the committed questions, as assets/tiny/make.py chose it


def run_one(name: str, flags: str, seed: int, out: Path, data: str) -> dict:
    """One laptop run as a user starts it, 60 steps of 64 completions; its line of the table."""
    command = ["grpo_demo.py", "--config", "assets/tiny/config.yaml", "--max_steps", "60", "--save_steps", "60"]
    command += ["--seed", str(seed), "--output_dir", str(out), "--dataset_name", data, *flags.split()]
    command += ["--report_to", "none", "--log_completions", "False", "--disable_tqdm", "True"]
    single = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=HERE.parent, env=single, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}: exit {done.returncode}\n{done.stderr[-2000:]}")
    (state,) = out.glob("checkpoint-*/trainer_state.json")
    log = [step for step in json.loads(state.read_text())["log_history"] if "reward" in step]
    kept = ["rewards/soft_format_reward_func/mean", "rewards/strict_format_reward_func/mean", "accuracy/strict"]
    kept += ["accuracy/lenient", "frac_reward_zero_std", "kl", "completions/mean_length"]
    curve = {key: [round(step.get(key, 0.0), 4) for step in log] for key in kept}  # without beta there is no kl
    evaluation = json.loads((out / "evaluation.json").read_text())
    measured = {k: {c: v[c]["value"] for c in v} for k, v in evaluation["measurements"].items()}
    row = {"change": name, "flags": flags, "seed": seed, "date": str(date.today()), **environment()}
    row |= {"moved": moved(out), "verdict": evaluation["verdict"], "gain": evaluation["gain"]}
    return row | {"measured": measured, "curve": curve}


def moved(out: Path) -> dict[str, float]:
    """How far training took the weights from the embedded model's: share that is not the same, relative distance."""
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (HERE / "tiny", out))
    pairs = [(before[name].double(), after[name].double()) for name in before]
    changed = sum((b != a).sum().item() for b, a in pairs) / sum(b.numel() for b, _ in pairs)
    distance = sum(((b - a) ** 2).sum().item() for b, a in pairs) / sum((b**2).sum().item() for b, _ in pairs)
    return {"changed": changed, "distance": distance**0.5}


def main() -> None:
    kinds = {"settings": (SETTINGS, [3, 4, 5]), "parts": (PARTS, [42, 1, 2]), "updates": (UPDATES, [42, 1, 2])}
    if len(sys.argv) != 2 or sys.argv[1] not in kinds:
        raise SystemExit(__doc__)
    kind, (changes, seeds) = sys.argv[1], kinds[sys.argv[1]]
    path = HERE / "runs" / f"{kind}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    there = {(row["change"], row["seed"]) for row in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        data = "assets/tiny"
        if kind == "settings":
            sys.path.insert(0, str(HERE / "tiny"))
            from make import write_rows

            data = folder
            Path(folder, "train.jsonl").write_bytes((HERE / "tiny" / "train.jsonl").read_bytes())
            write_rows(Path(folder, "test.jsonl"), "validation", 512, HARD_SHARE, seed=7)
        wanted = [(name, flags, seed) for seed in seeds for name, flags in changes.items()]
        missing = [job for job in wanted if (job[0], job[2]) not in there]
        jobs = [pool.submit(run_one, *job, Path(folder, str(i)), data) for i, job in enumerate(missing)]
        for job in jobs:  # in the order of the table, whichever ends first
            try:
                row = job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row["change"], row["seed"], row["verdict"], row["measured"]["after_zero_shot"], flush=True)


if __name__ == "__main__":
    main()
