"""The script as a user runs it: the laptop run read back, LoRA, hub ids, two machines."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from statistics import mean
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import LAPTOP, ROOT, command, inspect, run, series, wandb_rows
from huggingface_hub import ModelCard

import grpo_demo
from assets.research.record import collect, time_split
from rewards import REWARD_FUNCS

NAMES = [f.__name__ for f in REWARD_FUNCS]
FAST = ("--max_steps", 2, "--save_strategy", "no", "--eval_samples", 32, "--log_completions=False")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
USED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print('USED', used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20, file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def laptop(tmp_path_factory) -> SimpleNamespace:
    """README's first command, run once, as a user does, for all tests that look at it.

    rows, records  of W&B: its history, all of its file; end: its config and summary
    cpu, peak      seconds on all cores, which a busy machine hardly changes; memory in GB
    """
    out = tmp_path_factory.mktemp("laptop") / "tiny"
    env = {"HF_DATASETS_CACHE": str(ROOT / "README.md/cache")}  # which cannot be written
    launcher = (sys.executable, "-c", USED, sys.executable)
    done = command(*LAPTOP, "--output_dir", out, env=env, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    errors, used = done.stderr.split("USED ")
    cpu, peak = map(float, used.split())
    (file,) = out.glob("wandb/*run-*/*.wandb")
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    end = json.loads(subprocess.run(leet, capture_output=True, check=True).stdout)
    result = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    records = inspect(file)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return SimpleNamespace(**locals(), stdout=done.stdout)


def test_format_is_learned_within_time_and_memory(laptop):
    print(f"laptop run: {laptop.cpu:.0f} s of CPU, {laptop.peak:.2f} GB")
    assert laptop.cpu < 240 and laptop.peak < 2  # a minute on two quiet cores takes 90 s of CPU
    rewards = {name: series(laptop.rows, f"train/rewards/{name}/mean") for name in NAMES}
    assert {len(values) for values in rewards.values()} == {60}
    xmlcount, soft, strict, _, correct = rewards.values()
    assert mean(soft[:5]) <= 0.15 and mean(soft[-10:]) >= 0.45
    assert mean(strict[-10:]) >= 0.42 and mean(xmlcount[-10:]) >= 0.42
    assert mean(correct[-10:]) >= 3 * mean(correct[:10])


def test_wandb_holds_everything_over_the_training_step(laptop):
    """TRL's timers are rows of their own: step_sync gives them the step of the row before them."""
    timers = [f"profiling/Time taken: GRPOTrainer.{n}" for n in [*NAMES, "transformers.generate"]]
    rewards = [f"train/rewards/{name}/{kind}" for name in NAMES for kind in ("mean", "std")]
    metrics = "loss kl step_time accuracy/strict accuracy/lenient completions/mean_length"
    for name in [*timers, *rewards, *(f"train/{name}" for name in metrics.split())]:
        assert len(series(laptop.rows, name)) == 60, name
    defined = [record["metric"] for record in laptop.records if record["type"] == "metric"]
    defined = {metric.get("name") or metric.get("glob_name"): metric for metric in defined}
    assert set(defined) == {"train/global_step", "*"}  # no series has another axis
    assert defined["*"]["step_metric"] == "train/global_step"
    assert defined["*"]["options"]["step_sync"] is True
    steps = [row["train/global_step"] for row in laptop.rows]
    assert steps == sorted(steps)
    tables = sorted(laptop.out.glob("wandb/*run-*/files/media/table/completions_*.json"))
    table = json.loads(tables[-1].read_text())
    columns = {"prompt", "completion", "gold", "extracted", "advantage", *NAMES}
    assert columns <= set(table["columns"]) and len(tables) == 60 and len(table["data"]) == 64
    config = json.dumps(laptop.end["config"])
    for name in ("learning_rate", "beta", "model_name_or_path", "dataset_name", "prompts"):
        assert f'"{name}"' in config, name


def test_the_time_split_of_a_step(laptop):
    metrics, timers, _ = collect(laptop.out)
    split = time_split(metrics, timers)
    whole = (metrics[-1]["runtime"] - metrics[0]["runtime"]) / 59
    print({part: f"{seconds / whole:.2%}" for part, seconds in split.items()})
    assert sum(split.values()) == pytest.approx(whole) and min(split.values()) > -0.01 * whole
    assert split["five rewards"] < 0.02 * whole < split["backward"] < split["generate"]


def test_the_evaluation_and_the_card(laptop):
    result, summary = laptop.result, laptop.end["summary"]
    names = ["before_zero_shot", "before_one_shot", "after_zero_shot"]
    assert list(result["measurements"]) == names and result["verdict"] == "format"
    zero, _, after = result["measurements"].values()
    assert zero["strict_format"]["value"] <= 0.15 and after["strict_format"]["value"] >= 0.9
    assert after["strict_accuracy"]["value"] - zero["strict_accuracy"]["value"] >= 0.3
    card = (laptop.out / "README.md").read_text(encoding="utf-8")
    for name, figures in result["measurements"].items():
        kept = pd.read_parquet(laptop.out / "evaluation" / f"{name}.parquet")
        value = figures["lenient_accuracy"]["value"]
        assert len(kept) == figures["lenient_accuracy"]["n"] == 512
        assert value == pytest.approx(kept["lenient_accuracy"].mean()) and f"{value:.1%} [" in card
        assert summary[f"eval/{name}/lenient_accuracy"] == pytest.approx(value)
    assert summary["eval/answers"]["nrows"] == 150  # one point is no curve: only in the summary
    points = Counter(name for row in laptop.rows for name in row if name.startswith("eval/"))
    assert set(points) <= {"eval/answers"}
    assert "None" not in card and "--config assets/tiny/config.yaml" in card
    assert all(sentence in card for sentence in result["sentences"])
    assert ModelCard(card).data.base_model is None  # assets/tiny is no id on the hub


def test_the_log_is_short_and_fits_in_80_columns(laptop):
    """Commands and paths may be longer: they are there to be copied."""
    lines = laptop.stdout.splitlines()
    print(f"{len(laptop.stdout):,} bytes in {len(lines)} lines")
    assert len(laptop.stdout) < 40_000 and len(laptop.errors.splitlines()) < 5, laptop.errors
    assert "it/s" not in laptop.errors and "examples" not in laptop.errors  # no progress bars
    paths = ("output", "W&B", "wandb ")
    assert [line for line in lines if len(line) > 80 and not line.startswith(paths)] == []
    progress = [line for line in lines if re.match(r"\d+/60 ", line)]
    assert len(progress) == 60 and progress[-1].startswith("60/60 ")
    assert laptop.stdout.count("gold ") == laptop.stdout.count("advantage ") == 7  # 1, 10, ... 60
    for text in ("683,040", "torch.float32", "sdpa", "480 prompts", "64 completions"):
        assert text in laptop.stdout, text
    for command_line in ("wandb leet", "wandb sync --include-online"):
        assert f"{command_line} {laptop.out}" in laptop.stdout


def test_an_evaluation_leaves_training_alone_and_has_its_precision(tmp_path):
    """With a learning rate of 0, after is before, in bf16 over float32 weights too."""
    few = ("--per_device_train_batch_size", 16, "--num_generations", 4, "--learning_rate", 0)
    few = (*few, "--max_steps", 1, "--save_strategy", "no", "--report_to", "none")
    few = (*few, "--max_completion_length", 32, "--eval_samples", 32, "--eval_generations", 2)
    with_it, without = ("--evaluate", "True"), ("--evaluate", "False")
    answers = {}
    for name, flags in (("bf16", ("--bf16", "True")), ("with", with_it), ("without", without)):
        out = tmp_path / name
        done = run(*LAPTOP, *few, *flags, "--output_dir", out)
        assert done.returncode == 0, done.stderr[-2000:]
        files = sorted(out.glob("evaluation/*_zero_shot.parquet"))
        answers[name] = [pd.read_parquet(file)["completion"] for file in files]
    after, before = answers["bf16"]
    assert after.equals(before) and answers["with"][0].equals(answers["with"][1])
    assert not before.equals(answers["with"][0])  # the precision shows
    assert not answers["without"] and not (out / "evaluation.json").exists()
    step = "completions/completions_00001.parquet"
    trained = [pd.read_parquet(tmp_path / name / step) for name in ("with", "without")]
    assert trained[0].equals(trained[1]) and len(trained[0]) == 16
    kept = json.loads((tmp_path / "with/evaluation.json").read_text())
    assert len(kept["sentences"]) == 4 and list(kept["pass"]) == list(kept["measurements"])


def test_lora_and_eval_only(tmp_path):
    out = tmp_path / "lora"
    flags = (*LAPTOP, "--eval_samples", 16)
    done = run(*flags, *FAST, "--use_peft", "--output_dir", out, "--learning_rate", "1e-3")
    assert done.returncode == 0, done.stderr[-2000:]
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 64, 0.05)
    assert set(adapter["target_modules"]) == set(grpo_demo.LORA_TARGET_MODULES)
    assert not (out / "model.safetensors").exists()
    where = ("--model_name_or_path", out, "--output_dir", tmp_path / "e")
    done = run(*flags, "--eval_samples", 32, "--eval_only", *where)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "e").glob("eval-*/evaluation.json")
    again, trained = (json.loads(f.read_text())["measurements"] for f in (file, out / file.name))
    assert set(again) == {"zero_shot", "one_shot"}
    assert again["zero_shot"] == trained["after_zero_shot"]  # the adapter is read back


def test_the_default_model_from_a_hugging_face_cache(tmp_path):
    """What a GPU box runs: the default id, here from a cache with the embedded model's files."""
    snapshot = tmp_path / "models--Qwen--Qwen2.5-1.5B-Instruct/snapshots" / ("0" * 40)
    shutil.copytree(ROOT / "assets/tiny", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    small = ("--use_cpu", "--max_completion_length", 8, "--max_steps", 1, "--eval_samples", 8)
    small += ("--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 4)
    small += ("--dataset_name", "assets/tiny", "--save_strategy", "no")
    env = {"HF_HUB_CACHE": str(tmp_path)}
    done = command(*small, "--output_dir", tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for text in ("Qwen/Qwen2.5-1.5B-Instruct", "torch.bfloat16", "in groups of 16"):
        assert text in done.stdout
    assert (
        ModelCard.load(tmp_path / "out/README.md").data.base_model == "Qwen/Qwen2.5-1.5B-Instruct"
    )


def test_two_nodes_share_the_evaluation_print_once_and_stop_together(tmp_path):
    """README's command for two machines, here on one; the signal reaches the second one only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = ("--master_addr", "127.0.0.1", "--master_port", free.getsockname()[1])
    flags = (*LAPTOP, "--max_steps", 30, "--eval_samples", 33, "--log_completions", "False")
    two = ("--per_device_train_batch_size", 32, "--save_steps", 2, "--output_dir", tmp_path / "two")
    nodes = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for rank in (0, 1):
        where = ("--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1, *rendezvous)
        line = map(str, (*TORCHRUN, *where, "grpo_demo.py", *flags, *two))
        nodes.append(subprocess.Popen(line, cwd=ROOT, **pipes))
    while not (tmp_path / "two/checkpoint-2/trainer_state.json").exists():
        assert nodes[0].poll() is nodes[1].poll() is None, nodes[0].communicate()[1][-2000:]
        time.sleep(0.1)
    (worker,) = subprocess.check_output(["pgrep", "-P", str(nodes[1].pid)], text=True).split()
    os.kill(int(worker), signal.SIGTERM)
    texts = [node.communicate(timeout=120) for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "64 completions in groups of 8" in texts[0][0] and "completions" not in texts[1][0]
    step = int(re.search(r"stopped at step (\d+);", texts[0][0])[1])
    assert (tmp_path / f"two/checkpoint-{step}/rng_state_1.pth").exists()
    assert max(series(wandb_rows(tmp_path / "two"), "train/global_step")) == step
    one = (*flags, "--max_steps", 1, "--save_strategy", "no", "--output_dir", tmp_path / "one")
    assert run(*one).returncode == 0
    path = "evaluation/before_zero_shot.parquet"
    rows = [pd.read_parquet(tmp_path / out / path) for out in ("one", "two")]
    assert rows[0].equals(rows[1]) and len(rows[0]) == 33  # sharded, gathered, in order
