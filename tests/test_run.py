"""The script as a user runs it: the laptop run read back from W&B, LoRA, hub ids, two processes."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from conftest import (
    LAPTOP,
    ROOT,
    command,
    gsm8k,
    inspect,
    needs_gsm8k,
    run,
    series,
    wandb_rows,
)
from datasets import load_dataset_builder
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

import grpo_demo
from assets import settings
from assets.research.record import collect, time_split
from assets.terminal import watch_reward
from rewards import REWARD_FUNCS

NAMES = [f.__name__ for f in REWARD_FUNCS]
FAST = ("--max_steps", 3, "--save_strategy", "no", "--eval_samples", 32, "--log_completions=False")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PEAK = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print('PEAK_KB', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


class Laptop(NamedTuple):
    """README's first command, run as a user does."""

    out: Path  # its output directory
    stdout: str
    errors: str
    rows: list[dict]  # W&B's history
    seconds: float
    peak: float  # memory in GB


@pytest.fixture(scope="session")
def laptop(tmp_path_factory) -> Laptop:
    out = tmp_path_factory.mktemp("laptop") / "tiny"
    start = time.time()
    launcher = (sys.executable, "-c", PEAK, sys.executable)
    done = command(*LAPTOP, "--output_dir", out, launcher=launcher)
    seconds = time.time() - start
    assert done.returncode == 0, done.stderr[-3000:]
    errors, peak = done.stderr.split("PEAK_KB ")
    return Laptop(out, done.stdout, errors, wandb_rows(out), seconds, int(peak) / 2**20)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_time_and_memory(laptop):
    print(f"laptop run: {laptop.seconds:.0f} s, {laptop.peak:.2f} GB")
    assert laptop.seconds < 180 and laptop.peak < 2


def test_format_is_learned(laptop):
    rewards = {name: series(laptop.rows, f"train/rewards/{name}/mean") for name in NAMES}
    assert {len(values) for values in rewards.values()} == {60}
    xmlcount, soft, strict, _, correct = rewards.values()
    assert mean(soft[:5]) <= 0.15 and mean(soft[-10:]) >= 0.45
    assert mean(strict[-10:]) >= 0.42 and mean(xmlcount[-10:]) >= 0.42
    assert mean(correct[-10:]) >= 3 * mean(correct[:10])


def test_wandb_holds_everything(laptop):
    rows = laptop.rows
    for name in [*NAMES, "transformers.generate"]:
        assert len(series(rows, f"profiling/Time taken: GRPOTrainer.{name}")) == 60, name
    for name in NAMES:
        assert len(series(rows, f"train/rewards/{name}/std")) == 60
    for name in ("accuracy/strict", "accuracy/lenient", "kl", "step_time"):
        assert len(series(rows, f"train/{name}")) == 60, name
    tables = sorted(laptop.out.glob("wandb/*run-*/files/media/table/completions_*.json"))
    assert len(tables) >= 60  # one a step, and one when training ends
    table = json.loads(tables[-1].read_text())
    columns = {"prompt", "completion", "gold", "extracted", "advantage", *NAMES}
    assert columns <= set(table["columns"]) and len(table["data"]) == 64


def test_logged_accuracy_is_that_of_the_completions(laptop):
    last = pd.read_parquet(sorted(laptop.out.glob("completions/*.parquet"))[-1])
    texts = [message[0]["content"] for message in last["completion"]]
    scores = [grpo_demo.rewards.score(*pair) for pair in zip(texts, last["gold"], strict=True)]
    for name in ("strict", "lenient"):
        share = mean([score[f"{name}_accuracy"] for score in scores])
        assert series(laptop.rows, f"train/accuracy/{name}")[-1] == pytest.approx(share)
    assert list(last["extracted"]) == [grpo_demo.rewards.extract_xml_answer(t) for t in texts]


def test_the_time_split_of_a_step(laptop):
    metrics, timers, _ = collect(laptop.out)
    split = time_split(metrics, timers)
    whole = (metrics[-1]["runtime"] - metrics[0]["runtime"]) / 59
    print({part: f"{seconds / whole:.2%}" for part, seconds in split.items()})
    assert sum(split.values()) == pytest.approx(whole) and min(split.values()) > -0.01 * whole
    assert split["five rewards"] < 0.01 * whole < split["backward"] < split["generate"]


def test_the_model_card(laptop):
    out = laptop.out
    card = (out / "README.md").read_text()
    result = json.loads((out / "evaluation.json").read_text())
    for name, columns in result["measurements"].items():
        value = columns["strict_accuracy"]["value"]
        assert f" {name.replace('_', ' ')} |" in card and f"| {value:.1%} [" in card
    assert "None" not in card and "assets/tiny/config.yaml" in card
    assert all(sentence in card for sentence in result["sentences"])
    assert ModelCard(card).data.base_model is None  # assets/tiny is no id on the hub


def test_the_advised_upload_has_the_model_and_no_logs(laptop):
    out = laptop.out
    advice = shlex.split(settings.NOT_SUPPORTED["push_to_hub"])
    excluded = [after for flag, after in pairwise(advice) if flag == "--exclude"]
    paths = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(paths, ignore_patterns=excluded))
    model = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert model <= sent and {Path(path).parts[0] for path in sent - model} <= {
        "chat_template.jinja",
        "evaluation",
        "evaluation.json",
        "generation_config.json",
        "tokenizer_config.json",
        "training_args.bin",
    }


def summary(out: Path, part: str = "summary") -> dict:
    """Return what W&B's files hold at the end of a run: its summary, or its config."""
    (file,) = out.glob("wandb/*run-*/*.wandb")
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    return json.loads(subprocess.run(leet, capture_output=True, check=True).stdout)[part]


def check_x_axis(out: Path, rows: list[dict], *names: str) -> None:
    """Check that W&B draws every series over train/global_step, and that each point has it.

    TRL's timers are rows of their own: "step_sync" gives them the step of the row before them.
    """
    (file,) = out.glob("wandb/*run-*/*.wandb")
    metrics = [record["metric"] for record in inspect(file) if record["type"] == "metric"]
    defined = {metric.get("name") or metric.get("glob_name"): metric for metric in metrics}
    assert set(defined) == {"train/global_step", "*"}  # no series has another axis
    assert defined["*"]["step_metric"] == "train/global_step"
    assert defined["*"]["options"]["step_sync"] is True
    steps = [row["train/global_step"] for row in rows]
    assert steps == sorted(steps)
    for name in names:
        assert series(rows, name), name


def test_wandb_draws_everything_over_the_training_step(laptop):
    timers = [f"profiling/Time taken: GRPOTrainer.{name}" for name in NAMES]
    rewards = [f"train/rewards/{name}/mean" for name in NAMES]
    check_x_axis(laptop.out, laptop.rows, "train/loss", "train/kl", *rewards, *timers)


def test_held_out_accuracy_while_training(tmp_path):
    flags = ("--eval_strategy", "steps", "--eval_steps", 1, "--eval_samples", 16)
    flags += ("--per_device_train_batch_size", 16, "--max_steps", 2, "--max_completion_length", 32)
    done = run(*LAPTOP, *FAST, *flags, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = wandb_rows(tmp_path / "run")
    for name in ("strict", "lenient"):
        assert len(series(rows, f"eval/accuracy/{name}")) == 2
        assert len(series(rows, f"train/accuracy/{name}")) == 2
    held_out = [row["train/global_step"] for row in rows if "eval/reward" in row]
    assert held_out == [1, 2]
    check_x_axis(tmp_path / "run", rows, "eval/accuracy/strict", "eval/reward")


def test_wandb_holds_the_configuration(laptop):
    config = json.dumps(summary(laptop.out, "config"))
    for name in ("learning_rate", "beta", "model_name_or_path", "dataset_name", "system_prompt"):
        assert f'"{name}"' in config, name


def test_what_is_printed(laptop):
    for text in ("683,040", "torch.float32", "sdpa", "480 prompts", "64 completions"):
        assert text in laptop.stdout, text
    for command_line in ("wandb leet", "wandb sync --include-online"):
        assert f"{command_line} {laptop.out}" in laptop.stdout


def test_the_log_is_short_and_fits_in_80_columns(laptop):
    """Commands and paths may be longer: they are there to be copied."""
    lines = laptop.stdout.splitlines()
    print(f"{len(laptop.stdout):,} bytes in {len(lines)} lines")
    assert len(laptop.stdout) + len(laptop.errors) < 40_000
    paths = ("output", "W&B", "wandb ", "chat = ")
    assert [line for line in lines if len(line) > 80 and not line.startswith(paths)] == []
    progress = [line for line in lines if re.match(r"\d+/60 ", line)]
    assert 10 <= len(progress) <= 30 and progress[-1].startswith("60/60 ")
    for word in ("left", "reward", "format", "right", "kl", "tok"):
        assert word in progress[0]
    samples = [line for line in lines if line.startswith("\u256d\u2500 step ")]
    assert len(samples) == 7  # the first step and every tenth
    assert laptop.stdout.count("gold ") == laptop.stdout.count("advantage ") == 7


def in_a_terminal(*flags: str, env: dict[str, str]) -> str:
    """Run the script in a terminal of 80 columns; return all that it showed."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    argv = [sys.executable, "grpo_demo.py", *LAPTOP, *flags]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"TERM": "xterm"} | env, **streams)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    assert process.wait() == 0, shown[-2000:]
    return shown.decode()


def test_a_terminal_has_one_line_of_progress(tmp_path):
    flags = ["--max_steps", "3", "--evaluate", "False", "--report_to", "none"]
    shown = in_a_terminal(*flags, "--output_dir", str(tmp_path / "a"), env={"NO_COLOR": "1"})
    assert re.findall(r"\x1b\[[0-9;]*3\dm", shown) == []  # no colour
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown)
    drawn = [
        line for line in re.split(r"[\r\n]+", plain) if not line.startswith(("output", "chat"))
    ]
    assert max(map(len, drawn)) <= 80
    assert re.search(r"3/3 00:00 left .* reward .* format .* right .* kl [\d.]+ tok \d+", plain)
    assert plain.count("advantage ") == 1  # the first step's sample
    flags += ["--disable_tqdm", "True", "--output_dir", str(tmp_path / "b")]
    assert "\r3/3" not in in_a_terminal(*flags, env={}) and "\r3/3" in shown


def test_the_printed_line_talks_to_the_model(laptop):
    line = laptop.stdout.split("talk to the model:\n")[1]
    line = line.replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<answer>" in done.stdout


def test_the_evaluation(laptop):
    out = laptop.out
    result = json.loads((out / "evaluation.json").read_text())
    zero, one, after = result["measurements"].values()
    assert list(result["measurements"]) == [
        "before_zero_shot",
        "before_one_shot",
        "after_zero_shot",
    ]
    assert zero["strict_format"]["value"] <= 0.15 and after["strict_format"]["value"] >= 0.9
    assert after["strict_accuracy"]["value"] - zero["strict_accuracy"]["value"] >= 0.3
    assert all(m["lenient_accuracy"]["n"] == 512 for m in (zero, one, after))
    assert result["verdict"] == "format" and "learned: format" in laptop.stdout
    for name in result["measurements"]:
        kept = pd.read_parquet(out / "evaluation" / f"{name}.parquet")
        value = result["measurements"][name]["lenient_accuracy"]["value"]
        assert len(kept) == 512 and value == pytest.approx(kept["lenient_accuracy"].mean())
        assert f"eval/{name}/strict_accuracy" in summary(out)
    assert summary(out)["eval/answers"]["nrows"] == 150
    points = Counter(name for row in laptop.rows for name in row if not name.startswith("_"))
    assert {name for name, n in points.items() if n == 1 and "eval/" in name} <= {
        name for name in points if name.startswith("eval/chart")
    }


BRIEF = ("--max_steps", 1, "--evaluate", "False", "--save_strategy", "no")
BRIEF = (*LAPTOP, *BRIEF, "--per_device_train_batch_size", 8)


@pytest.mark.parametrize("off", [{"WANDB_DISABLED": "true"}, {"WANDB_MODE": "disabled"}])
def test_wandb_is_off_when_the_environment_says_so(tmp_path, off):
    key = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run(*BRIEF, "--output_dir", tmp_path / "run", env=key | off)
    assert done.returncode == 0 and "W&B" not in done.stdout, done.stderr[-2000:]
    assert not list(tmp_path.rglob("*.wandb"))


def test_wandb_takes_name_and_folder_from_the_environment(tmp_path):
    env = {"WANDB_NAME": "mine", "WANDB_DIR": str(tmp_path / "there")}
    (tmp_path / "there").mkdir()
    done = run(*BRIEF, "--output_dir", tmp_path / "run", env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("*.wandb")
    assert file.is_relative_to(tmp_path / "there") and f"wandb leet {file.parent}" in done.stdout
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    assert '"mine"' in subprocess.run(inspect, capture_output=True, text=True).stdout


def test_a_terminal_that_lacks_a_character_does_not_stop_the_run(tmp_path):
    rows = [json.dumps({"question": f"{i} \u2014 \u20ac?", "answer": "#### 1"}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    flags = (*BRIEF, "--dataset_name", tmp_path, "--output_dir", tmp_path / "run")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = command(*flags, env={"PYTHONIOENCODING": "ascii", **plain})
    assert done.returncode == 0 and "1/1" in done.stdout and " ? ??" in done.stdout


def test_a_reward_that_is_not_finite_is_named_once(capsys):
    def odd(completions, **kwargs):
        return [float("nan"), None, float("-inf"), 1.0]

    completions = [[{"role": "assistant", "content": text}] for text in "abcd"]
    watched = watch_reward(odd)
    assert watched.__name__ == "odd" and watched(completions=completions)[3] == 1.0
    watched(completions=completions)
    (line,) = capsys.readouterr().err.splitlines()
    assert "odd" in line and "2 of 4" in line and line.endswith("'a'")


def test_evaluation_does_not_change_training(tmp_path):
    losses = []
    few = ("--per_device_train_batch_size", 16, "--num_generations", 4)
    for flag in ("True", "False"):
        flags = (*FAST, *few, "--output_dir", tmp_path / flag, "--evaluate", flag)
        assert run(*LAPTOP, *flags, "--eval_generations", 2).returncode == 0
        losses.append(series(wandb_rows(tmp_path / flag), "train/loss"))
    assert losses[0] == losses[1] != []
    kept = json.loads((tmp_path / "True" / "evaluation.json").read_text())
    assert len(kept["sentences"]) == 4 and list(kept["pass"]) == list(kept["measurements"])
    assert not (tmp_path / "False" / "evaluation.json").exists()


def test_before_and_after_are_measured_in_the_same_precision(tmp_path):
    """With a learning rate of 0 they are the same answers, in bf16 over float32 weights too."""
    flags = (*LAPTOP, *FAST, "--eval_samples", 64, "--max_steps", 1, "--learning_rate", 0)
    flags += ("--per_device_train_batch_size", 8, "--max_completion_length", 32)
    answers = []
    for bf16 in ("True", "False"):
        out = tmp_path / bf16
        done = run(*flags, "--bf16", bf16, "--output_dir", out)
        assert done.returncode == 0, done.stderr[-2000:]
        before, after = (
            pd.read_parquet(out / "evaluation" / f"{when}_zero_shot.parquet")["completion"]
            for when in ("before", "after")
        )
        assert before.equals(after)
        answers.append(before)
    assert not answers[0].equals(answers[1])  # the precision shows


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
    done = run(*flags, "--eval_only", *where)
    assert done.returncode == 0 and "16 questions" in done.stdout, done.stderr[-2000:]
    (file,) = (tmp_path / "e").glob("eval-*/evaluation.json")
    assert set(json.loads(file.read_text())["measurements"]) == {"zero_shot", "one_shot"}


def cached_model(cache) -> None:
    """Make a hub cache that holds the embedded model's files under the default id."""
    snapshot = cache / "models--Qwen--Qwen2.5-1.5B-Instruct/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in (ROOT / "assets/tiny").iterdir():
        if file.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copy(file, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)


def cached_dataset(cache, tmp_path) -> None:
    """Make a datasets cache that holds 64 and 16 real rows under the default id."""
    for split, n in (("train", 64), ("test", 16)):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, gsm8k(split)[:n])))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    made = tmp_path / "made"
    load_dataset_builder("json", data_files=files, cache_dir=str(made)).download_and_prepare()
    prepared = cache / "openai___gsm8k/main/0.0.0" / ("1" * 40)
    prepared.mkdir(parents=True)
    for file in made.rglob("*/*"):
        if file.suffix == ".arrow":
            shutil.copy(file, prepared / file.name.replace("json-", "gsm8k-"))
        if file.name == "dataset_info.json":
            info = json.loads(file.read_text()) | {"dataset_name": "gsm8k", "config_name": "main"}
            (prepared / file.name).write_text(json.dumps(info))


@needs_gsm8k
def test_the_default_ids_from_a_hugging_face_cache(tmp_path):
    """What a GPU box runs: the default ids, here from a cache with the embedded model's files."""
    hub = tmp_path / "hub"
    data = tmp_path / "datasets"
    cached_model(hub)
    cached_dataset(data, tmp_path)
    env = {"HF_HUB_CACHE": str(hub), "HF_DATASETS_CACHE": str(data)}
    small = ("--use_cpu", "--max_completion_length", 16, "--max_steps", 2, "--eval_samples", 8)
    done = command(*small, "--save_strategy", "no", "--output_dir", tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for text in ("Qwen/Qwen2.5-1.5B-Instruct", "torch.bfloat16", "openai/gsm8k, 64 prompts"):
        assert text in done.stdout
    assert "64 completions in groups of 16" in done.stdout
    data = ModelCard.load(tmp_path / "out/README.md").data
    assert data.base_model == "Qwen/Qwen2.5-1.5B-Instruct" and data.datasets == "openai/gsm8k"


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
