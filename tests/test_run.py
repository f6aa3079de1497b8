"""The script as a user runs it: the laptop run with its W&B file read back, LoRA, the default ids, two processes."""

import json
import re
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import ROOT, gsm8k, needs_gsm8k, run, wandb_rows
from datasets import load_dataset_builder

import grpo_demo
from assets.record import collect, time_split
from rewards import REWARD_FUNCS

CONFIG = ("--config", "assets/tiny/config.yaml")
NAMES = [f.__name__ for f in REWARD_FUNCS]
FAST = ("--max_steps", 3, "--save_strategy", "no", "--eval_samples", 32, "--log_completions", "False")


@pytest.fixture(scope="session")
def laptop(tmp_path_factory):
    """README's first command: output directory, what it printed, W&B history, seconds, peak memory in GB."""
    out = tmp_path_factory.mktemp("laptop") / "tiny"
    code = "import resource as r, subprocess, sys; status = subprocess.run(sys.argv[1:]).returncode; "
    code += "print('PEAK_KB', r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(status)"
    start = time.time()
    done = run(*CONFIG, "--output_dir", out, launcher=(sys.executable, "-c", code, sys.executable))
    seconds = time.time() - start
    assert done.returncode == 0, done.stderr[-3000:]
    peak = int(re.search(r"PEAK_KB (\d+)", done.stderr)[1]) / 2**20
    return out, done.stdout, wandb_rows(out), seconds, peak


def series(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_time_and_memory(laptop):
    *_, seconds, peak = laptop
    print(f"laptop run: {seconds:.0f} s, {peak:.2f} GB")
    assert seconds < 180 and peak < 2


def test_format_is_learned(laptop):
    rewards = {n: series(laptop[2], f"train/rewards/{n}/mean") for n in NAMES}
    assert {len(r) for r in rewards.values()} == {60}
    assert (
        mean(rewards["soft_format_reward_func"][:5]) <= 0.15 and mean(rewards["soft_format_reward_func"][-10:]) >= 0.45
    )
    assert mean(rewards["strict_format_reward_func"][-10:]) >= 0.42
    assert mean(rewards["xmlcount_reward_func"][-10:]) >= 0.42
    correct = rewards["simple_correctness_reward_func"]
    assert mean(correct[-10:]) >= 3 * mean(correct[:10])


def test_wandb_holds_everything(laptop):
    out, _, rows, *_ = laptop
    timers = [f"profiling/Time taken: GRPOTrainer.{n}" for n in [*NAMES, "transformers.generate"]]
    assert all(len(series(rows, timer)) == 60 for timer in timers)
    for name in NAMES:
        assert len(series(rows, f"train/rewards/{name}/std")) == 60
    for name in ("accuracy/strict", "accuracy/lenient", "reasoning/steps", "reasoning/valid_steps", "kl", "step_time"):
        assert len(series(rows, f"train/{name}")) == 60, name
    tables = sorted(out.glob("wandb/*run-*/files/media/table/completions_*.json"))
    assert len(tables) >= 60  # one a step, and one when training ends
    table = json.loads(tables[-1].read_text())
    assert {"prompt", "completion", "gold", "extracted", "advantage", *NAMES} <= set(table["columns"])
    assert len(table["data"]) == 64


def test_the_time_split_of_a_step(laptop):
    metrics, timers, _ = collect(laptop[0])
    split = time_split(metrics, timers)
    whole = (metrics[-1]["runtime"] - metrics[0]["runtime"]) / 59
    print({part: f"{seconds / whole:.2%}" for part, seconds in split.items()})
    assert sum(split.values()) == pytest.approx(whole) and min(split.values()) > -0.01 * whole
    assert split["five rewards"] < 0.01 * whole < split["backward"] < split["generate"]


def test_wandb_holds_the_configuration(laptop):
    (file,) = laptop[0].glob("wandb/*run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    config = json.loads(text)["config"]
    for name in ("learning_rate", "beta", "model_name_or_path", "dataset_name", "one_shot", "lora_r", "system_prompt"):
        assert name in json.dumps(config), name


def test_what_is_printed(laptop):
    out, stdout, *_ = laptop
    for text in (
        "674,432 parameters",
        "torch.float32",
        "sdpa",
        "480 rows",
        "60 steps of 64 completions = 8 prompts x 8",
    ):
        assert text in stdout, text
    assert f"wandb leet {out}" in stdout and f"wandb sync {out}" in stdout
    assert stdout.count("Step 1 ─") == 1 and "Step 60 ─" in stdout  # TRL's table, one completion a step


def test_the_printed_line_talks_to_the_model(laptop):
    command = (
        laptop[1].split("talk to the model:")[1].strip().splitlines()[0].replace("python ", f"{sys.executable} ", 1)
    )
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<answer>" in done.stdout and "'role': 'assistant'" in done.stdout


def test_the_evaluation(laptop):
    out, stdout, rows, *_ = laptop
    result = json.loads((out / "evaluation.json").read_text())
    zero, one, after = (result["measurements"][k] for k in ("before_zero_shot", "before_one_shot", "after_zero_shot"))
    assert zero["strict_format"]["value"] <= 0.15 and after["strict_format"]["value"] >= 0.9
    assert after["strict_accuracy"]["value"] - zero["strict_accuracy"]["value"] >= 0.3
    assert all(m["lenient_accuracy"]["n"] == 512 for m in (zero, one, after))
    assert f"verdict: {result['verdict']}" in stdout and all(s in stdout for s in result["sentences"])
    for name in result["measurements"]:
        kept = pd.read_parquet(out / "evaluation" / f"{name}.parquet")
        assert len(kept) == 512
        value = result["measurements"][name]["lenient_accuracy"]["value"]
        assert value == pytest.approx(kept["lenient_accuracy"].mean())
        assert any(f"eval/{name}.nrows" in row and row[f"eval/{name}.nrows"] == 50 for row in rows)


def losses(out) -> list[float]:
    return series(wandb_rows(out), "train/loss")


def test_evaluation_does_not_change_training(tmp_path):
    for name, flags in {"with": (), "without": ("--evaluate", "False")}.items():
        assert run(*CONFIG, *FAST, "--output_dir", tmp_path / name, *flags).returncode == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without") != []
    assert not (tmp_path / "without" / "evaluation.json").exists()


def test_lora_and_eval_only(tmp_path):
    out = tmp_path / "lora"
    done = run(*CONFIG, *FAST, "--use_peft", "--output_dir", out, "--learning_rate", "1e-3")
    assert done.returncode == 0, done.stderr[-2000:]
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 64, 0.05)
    assert set(adapter["target_modules"]) == set(grpo_demo.LORA_TARGET_MODULES)
    assert not (out / "model.safetensors").exists()
    done = run(
        *CONFIG, "--eval_only", "--model_name_or_path", out, "--output_dir", tmp_path / "e", "--eval_samples", 16
    )
    assert done.returncode == 0 and "16 questions" in done.stdout, done.stderr[-2000:]
    (file,) = (tmp_path / "e").glob("eval-*/evaluation.json")
    assert set(json.loads(file.read_text())["measurements"]) == {"zero_shot", "one_shot"}


def test_an_empty_test_split_is_said_and_training_goes_on(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(ROOT / "assets/tiny/train.jsonl", data)
    (data / "test.jsonl").write_text("")
    done = run(*CONFIG, *FAST, "--dataset_name", data, "--output_dir", tmp_path / "out")
    assert done.returncode == 0 and "warning: no evaluation: no usable row in the test split" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


@needs_gsm8k
def test_the_default_ids_from_a_hugging_face_cache(tmp_path):
    """What a GPU box runs: the default hub ids, here served from a cache that holds the embedded model's files."""
    snapshot = tmp_path / "hub/models--Qwen--Qwen2.5-1.5B-Instruct/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in (ROOT / "assets/tiny").iterdir():
        if file.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copy(file, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    for split in ("train", "test"):
        rows = gsm8k(split)[: 64 if split == "train" else 16]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    builder = load_dataset_builder("json", data_files=files, cache_dir=str(tmp_path / "made"))
    builder.download_and_prepare()
    prepared = tmp_path / "datasets/openai___gsm8k/main/0.0.0" / ("1" * 40)
    prepared.mkdir(parents=True)
    for file in (tmp_path / "made").rglob("*/*"):
        if file.suffix == ".arrow":
            shutil.copy(file, prepared / file.name.replace("json-", "gsm8k-"))
        if file.name == "dataset_info.json":
            info = json.loads(file.read_text()) | {"dataset_name": "gsm8k", "config_name": "main"}
            (prepared / file.name).write_text(json.dumps(info))
    env = {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }
    small = ("--use_cpu", "--max_completion_length", 16, "--max_steps", 2, "--eval_samples", 8, "--save_strategy", "no")
    done = run(*small, "--output_dir", tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Qwen/Qwen2.5-1.5B-Instruct" in done.stdout and "torch.bfloat16" in done.stdout
    assert "openai/gsm8k: 64 rows" in done.stdout and "2 steps of 64 completions = 4 prompts x 16" in done.stdout


def test_two_processes_take_the_same_64_completions(tmp_path):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    one, two = tmp_path / "one", tmp_path / "two"
    done = run(*CONFIG, *FAST, "--output_dir", two, "--per_device_train_batch_size", 32, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("3 steps of 64 completions = 8 prompts x 8") == 1  # only the first process prints
    assert done.stdout.count("verdict:") == 1
    run(*CONFIG, *FAST, "--output_dir", one)
    results = [json.loads((out / "evaluation.json").read_text())["measurements"] for out in (one, two)]
    assert results[0]["before_zero_shot"] == results[1]["before_zero_shot"]  # sharded, gathered: the same figures
    tokens = [series(wandb_rows(out), "train/completions/mean_length") for out in (one, two)]
    assert len(tokens[0]) == len(tokens[1]) == 3
