"""What a run shows and keeps in W&B: watched rewards, warnings, NaN, runs that follow another."""

import functools
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAPTOP, ROOT, run, series, wandb_rows
from safetensors.torch import load_file
from trl.trainer.utils import get_callable_name

import grpo_demo
import rewards

SMALL = (*LAPTOP, "--evaluate", "False", "--per_device_train_batch_size", 8, "--num_generations", 4)
SMALL = (*SMALL, "--max_completion_length", 8, "--save_strategy", "no")
FORMATS = (rewards.soft_format_reward_func, rewards.strict_format_reward_func)


def messages(*texts: str) -> list[list[dict]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def lengths(completions, unit=0.25, **kwargs):
    return [unit * len(c[0]["content"]) for c in completions]


async def awaited(completions, **kwargs):
    return lengths(completions)


class Awaited:
    async def __call__(self, completions, **kwargs):
        return lengths(completions)


PLAIN = [lengths, awaited, Awaited()]
KINDS = [*PLAIN, *map(functools.partial, PLAIN), lambda **kwargs: np.array(lengths(**kwargs))]
KINDS += [lambda **kwargs: list(torch.tensor(lengths(**kwargs)))]


@pytest.mark.parametrize("function", KINDS, ids=range(len(KINDS)))
def test_every_kind_of_reward_keeps_its_name_and_values(function):
    ((name, values),) = rewards.try_rewards([function]).items()
    assert name == get_callable_name(function)
    assert list(values) == [0.25 * len(text) for _, text, _ in rewards.EXAMPLES]


def test_a_reward_that_edits_its_texts_is_refused():
    def edit(completions, **kwargs):
        completions[0][0]["content"] = "edited"
        return lengths(completions)

    with pytest.raises(ValueError, match="edit"):
        rewards.try_rewards([edit])


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    """Return a function that trains with rewards of its own and returns what was printed."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of pytest stay

    def start(functions, *flags, out="run"):
        monkeypatch.setattr(rewards, "REWARD_FUNCS", functions)
        grpo_demo.main([*map(str, (*SMALL, "--output_dir", tmp_path / out, *flags))])
        return capsys.readouterr()

    return start


def constant(value: float):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    reward.__name__ = f"always_{value}"
    return reward


def test_equal_rewards_leave_the_weights_untouched_and_are_warned_of(train, tmp_path):
    constants = [constant(value) for value in (0.7, 0.1, 1.476, float("nan"))]
    exact = ("--beta", 0, "--weight_decay", 0, "--learning_rate", 0.1, "--warmup_steps", 0)
    exact += ("--per_device_train_batch_size", 12, "--num_generations", 12)  # rounds in float32
    exact += ("--reward_weights", *[0.3] * 6)
    shown = train([*constants, *FORMATS], "--max_steps", 21, *exact, out="it's a run")
    out = tmp_path / "it's a run"
    before, after = (load_file(p / "model.safetensors") for p in (ROOT / "assets/tiny", out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = wandb_rows(out)
    assert series(rows, "train/frac_reward_zero_std") == [1.0] * 21
    found = re.findall(r"(?m)^warning: step (\d+): (.*)$", shown.err)
    steps = {text: int(step) for step, text in found}
    assert sorted(steps.values()) == [1, 1, 20, 20]  # NaN; cut off; equal rewards; no format
    assert sum("always_nan" in text for text in steps) == 1
    texts = pd.read_parquet(out / "completions/completions_00020.parquet")["text"]
    ends = {repr(part) for text in texts for part in (text[:12], text[-12:])}
    assert [sum(end in text for end in ends) >= 2 for text in steps].count(True) == 1
    tables = list(out.glob("wandb/*run-*/files/media/table/completions_*.json"))
    assert len(tables) == 21  # the last one not twice
    (sync,) = [line for line in shown.out.splitlines() if line.startswith("wandb sync ")]
    done = subprocess.run(f"{sys.executable} -m {sync} --dry-run", shell=True, capture_output=True)
    assert done.returncode == 0 and b"Would sync 1 run" in done.stdout + done.stderr


def test_a_run_that_failed_gets_no_rows_of_the_next_one(train, tmp_path):
    def fails(completions, trainer_state=None, **kwargs):
        if trainer_state.global_step == 2:
            raise RuntimeError("a bug")
        return [0.0] * len(completions)

    with pytest.raises(RuntimeError, match="a bug"):
        train([*FORMATS, fails], "--max_steps", 3, out="first")
    train([*FORMATS], "--max_steps", 3, out="second")
    for out, steps in (("first", [1, 2]), ("second", [1, 2, 3])):
        rows = [row for row in wandb_rows(tmp_path / out) if "train/reward" in row]
        assert series(rows, "train/global_step") == steps


def test_a_run_that_is_not_finite_stops_and_saves_nothing_more(tmp_path):
    out = tmp_path / "run"
    wild = ("--learning_rate", 1e30, "--max_grad_norm", 0, "--warmup_steps", 1, "--max_steps", 8)
    saved = ("--save_strategy", "steps", "--save_steps", 1)
    done = run(*SMALL, *wild, *saved, "--output_dir", out)
    assert done.returncode == 1 and done.stderr.count("not finite") == 1, done.stderr[-2000:]
    assert not (out / "model.safetensors").exists()
    saved = [*out.glob("checkpoint-*/model.safetensors")]  # of step 1, with rate 0, and step 2
    assert len(saved) == 2 and all(x.isfinite().all() for f in saved for x in load_file(f).values())


def test_wandb_is_off_when_the_environment_or_a_settings_file_says_so(tmp_path):
    key = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    (tmp_path / "settings").write_text("[default]\nmode = disabled\n")  # as `wandb disabled`
    ways = [{"WANDB_DISABLED": "true"}, {"WANDB_MODE": "disabled"}]
    ways += [{"WANDB_CONFIG_DIR": str(tmp_path), "WANDB_MODE": None}]
    for number, off in enumerate(ways):
        flags = ("--max_steps", 1, "--beta", 0, "--output_dir", tmp_path / f"{number}")
        done = run(*SMALL, *flags, env=key | off | {"WANDB_DIR": str(tmp_path)})
        assert done.returncode == 0 and not list(tmp_path.rglob("*.wandb")), done.stderr[-2000:]
