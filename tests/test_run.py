"""The script as a user runs it: the laptop run read back; the default model from a cache."""

import json
import os
import re
import shutil
import subprocess
import sys
from statistics import mean
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import LAPTOP, ROOT, command, inspect, series
from huggingface_hub import ModelCard

from assets.research.record import collect, time_split, write_record
from rewards import REWARD_FUNCS

NAMES = [f.__name__ for f in REWARD_FUNCS]


@pytest.fixture(scope="module")
def laptop(tmp_path_factory) -> SimpleNamespace:
    """README's first command, run once, as a user does, for all tests that look at it.

    rows, records  of W&B: its history, all of its file; end: its config and summary
    cpu, peak      seconds on all cores, which a busy machine hardly changes; memory in GB
    """
    out = tmp_path_factory.mktemp("laptop") / "tiny"
    env = {"HF_DATASETS_CACHE": str(ROOT / "README.md/cache")}  # which cannot be written
    argv = [sys.executable, "grpo_demo.py", *LAPTOP, "--output_dir", out]
    logs = [out.with_suffix(f".{name}") for name in ("out", "err")]
    with logs[0].open("w") as stdout, logs[1].open("w") as stderr:
        done = subprocess.Popen(argv, cwd=ROOT, env=os.environ | env, stdout=stdout, stderr=stderr)
        _, status, used = os.wait4(done.pid, 0)
    stdout, errors = (log.read_text(encoding="utf-8") for log in logs)
    assert status == 0, errors[-3000:]
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
    (file,) = out.glob("wandb/*run-*/*.wandb")
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    end = json.loads(subprocess.run(leet, capture_output=True, check=True).stdout)
    result = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    records = inspect(file)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return SimpleNamespace(**locals())


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


def test_the_record_of_a_run(laptop, tmp_path):
    """What the tables and pictures are made from."""
    assert write_record(laptop.out, tmp_path) == 60
    record, samples = (
        json.loads((tmp_path / f"{x}.json").read_text()) for x in ("record", "samples")
    )
    settings = {"model_name_or_path": "assets/tiny", "beta": 0.04, "lora_r": "16", "seed": 42}
    assert settings.items() <= record["settings"].items() and record["resumed"] == 0
    assert 0.5 < record["moved"]["changed"] <= 1 and len(samples) == 20
    assert str(laptop.out) in record["command"] and (tmp_path / "evaluation.json").exists()


def test_the_time_split_of_a_step(laptop):
    metrics, timers, _ = collect(laptop.out)
    split = time_split(metrics, timers)
    whole = (metrics[-1]["runtime"] - metrics[0]["runtime"]) / 59
    print({part: f"{seconds / whole:.2%}" for part, seconds in split.items()})
    assert sum(split.values()) == pytest.approx(whole) and min(split.values()) > -0.01 * whole
    # Which of the two is longer depends on the machine
    assert split["five rewards"] < 0.02 * whole < min(split["generate"], split["backward"])


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
    assert not any(name.startswith("eval/") for row in laptop.rows for name in row)  # no curve
    assert "None" not in card and "--config assets/tiny/config.yaml" in card
    assert "gain in reasoning" in card
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


SMALL_STEP = """{use_cpu: true, max_completion_length: 8, max_steps: 1, save_strategy: "no",
    per_device_train_batch_size: 16, gradient_accumulation_steps: 4, eval_samples: 4,
    eval_generations: 2, run_name: größe-模型}
"""


def test_the_default_model_from_a_cache_in_a_locale_that_knows_ascii_only(tmp_path):
    """What a GPU box runs: the default id, here from a cache with the embedded model's files.

    Names and folder of W&B come from the environment. EncodingWarning would name each file that is
    read or written in the locale's encoding.
    """
    snapshot = tmp_path / "models--Qwen--Qwen2.5-1.5B-Instruct/snapshots" / ("0" * 40)
    shutil.copytree(ROOT / "assets/tiny", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    rows = [json.dumps({"question": f"{i} \u2014 \u20ac?", "answer": "#### 1"}) for i in range(8)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "small.yaml").write_text(SMALL_STEP, encoding="utf-8")
    (tmp_path / "there").mkdir()
    env = {"HF_HUB_CACHE": str(tmp_path), "WANDB_NAME": "mine", "WANDB_DIR": f"{tmp_path}/there"}
    env |= {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    env |= {"PYTHONWARNDEFAULTENCODING": "1"}
    flags = ("--dataset_name", tmp_path, "--output_dir", tmp_path / "out")
    done = command("--config", tmp_path / "small.yaml", *flags, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for text in ("Qwen/Qwen2.5-1.5B-Instruct", "torch.bfloat16", "in groups of 16", "1/1", " ? ??"):
        assert text in done.stdout
    assert not re.findall(rf"^{ROOT}/(?!\.venv/).* EncodingWarning.*", done.stderr, re.M)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-1.5B-Instruct"
    kept = json.loads((tmp_path / "out/evaluation.json").read_text(encoding="utf-8"))
    assert list(kept["pass"]) == list(kept["measurements"])
    (file,) = tmp_path.rglob("*.wandb")
    assert file.is_relative_to(tmp_path / "there") and b"mine" in file.read_bytes()
