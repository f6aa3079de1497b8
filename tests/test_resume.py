"""Stop it, kill it, change it: the resumed run is the undisturbed one, or refused in one line."""

import dataclasses
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import time
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import LAPTOP, Job, run, series, wandb_rows
from safetensors.torch import load_file

import grpo_demo
from assets.research.record import collect
from assets.resume import FREE, decide, describe, newest_checkpoint, write_json
from assets.resume import STOPS as STOP_SIGNALS

SMALL = "--num_generations 4 --per_device_train_batch_size 16 --max_completion_length 16"
SMALL += " --eval_samples 7 --log_completions False --disable_tqdm True --save_steps 1"
SMALL = (*LAPTOP, *SMALL.split())
QUICK = (*SMALL, "--evaluate", "False", "--report_to", "none", "--save_total_limit", 9)
STEPS = 10
FLAGS = (*SMALL, "--max_steps", STEPS)
KILLS = int(os.environ.get("KILLS", 3))
FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the model, or of the adapter, that a run has saved at its end."""
    (file,) = out.glob("*.safetensors")
    return load_file(file)


def logged(out: Path) -> list[dict]:
    """Return the rows that training has logged at each step; without times."""
    state = json.loads(Path(newest_checkpoint(out), "trainer_state.json").read_text())
    times = re.compile("time|per_second")
    return [{k: v for k, v in row.items() if not times.search(k)} for row in state["log_history"]]


def check_same(whole: Path, out: Path) -> None:
    """Check that two runs ended in the same weights, bit for bit, logs and answers."""
    left, right = weights(whole), weights(out)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    assert logged(whole) == logged(out)
    for file in out.glob("evaluation/*.parquet"):
        assert pd.read_parquet(file).equals(pd.read_parquet(whole / "evaluation" / file.name))


def wait_for(out: Path, pattern: str, job: Job) -> None:
    while not list(out.glob(pattern)):
        assert job.alive(), job.wait().stderr[-2000:]
        time.sleep(0.005)


def kill(job: Job, number: int = signal.SIGKILL) -> SimpleNamespace:
    os.kill(job.pid, number)
    return job.wait()


def finish(*flags: object) -> str:
    """Run to the end; return what it printed."""
    done = run(*flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def find_steps(out: Path) -> list[int]:
    """Return the steps that have a checkpoint, the last one first."""
    return sorted((int(folder.name[11:]) for folder in out.glob("checkpoint-*")), reverse=True)


def copy_killed(whole: Path, out: Path, step: int) -> None:
    """Copy a finished run, as if it had been killed after a step."""
    shutil.copytree(whole, out, symlinks=True)
    for later in (number for number in find_steps(out) if number > step):
        shutil.rmtree(out / f"checkpoint-{later}")
    next(out.glob("*.safetensors")).unlink()
    record = json.loads((out / "run.json").read_text())
    write_json(out / "run.json", record | {"finished": False})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


SAMPLED = ("--eval_generations", 2, "--per_device_eval_batch_size", 2)  # 4 and 7 batches each time


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run that many others must equal."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(*FLAGS, *SAMPLED, "--save_total_limit", 3, "--output_dir", out)
    return out


def test_killed_many_times_it_ends_the_same(whole, tmp_path):
    out, chance, while_writing = tmp_path / "run", random.Random(0), 0
    for number in range(KILLS):
        step = max(find_steps(out), default=0) + 1
        job, folder = Job(*FLAGS, "--output_dir", out), out / f"checkpoint-{step}"
        wait_for(out, folder.name, job)
        time.sleep(chance.uniform(0, 0.2) if number % 3 == 2 else 0)
        assert kill(job).returncode == -signal.SIGKILL
        while_writing += not (folder / "trainer_state.json").exists()
    finish(*FLAGS, "--output_dir", out)
    assert while_writing > 0
    check_same(whole, out)
    first, last = collect(whole), collect(out)  # the steps that were logged again only once
    for name in ("global_step", "reward", "loss", "kl", "accuracy/strict", "accuracy/lenient"):
        assert [row[name] for row in first.metrics] == [row[name] for row in last.metrics]
    assert first.timers.keys() == last.timers.keys() and last.started["resumed"] == KILLS
    assert all(len(last.timers[name]) == len(first.timers[name]) for name in first.timers)
    assert sorted(row["runtime"] for row in last.metrics) == [r["runtime"] for r in last.metrics]
    assert len({file.name for file in out.glob("wandb/*run-*/*.wandb")}) == 1  # they share an id
    assert find_steps(out) == [STEPS, STEPS - 1]


STOPS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]


def test_each_signal_saves_first(whole, tmp_path):
    """One run, stopped by each signal in turn, one of which comes twice, as from a terminal."""
    out, last = tmp_path / "run", 0
    flags = (*QUICK, "--max_steps", STEPS, "--save_steps", 2, "--output_dir", out)
    names = re.findall(r"SIG[A-Z\d]+", str(STOP_SIGNALS))
    assert {*names} == {*STOPS, "SIGUSR2", "SIGXCPU"}
    for name in STOPS:
        job, number = Job(*flags), getattr(signal, name)
        wait_for(out, f"checkpoint-{last + 2}/sizes.json", job)
        if name == "SIGHUP":
            os.kill(job.pid, number)
        done = kill(job, number)
        assert done.returncode == 128 + number, done.stderr[-2000:]
        step = int(newest_checkpoint(out).rsplit("-", 1)[1])
        assert last < step < STEPS and f"step {step}" in done.stdout
        last = step // 2 * 2
    assert f"checkpoint-{step}\n" in finish(*flags)
    check_same(whole, out)


def test_one_run_at_a_time_and_a_second_signal_stops_at_once(tmp_path):
    flags = (*QUICK, "--max_steps", 200, "--output_dir", tmp_path / "run")
    first = Job(*flags)
    wait_for(tmp_path, "run/checkpoint-1/sizes.json", first)
    assert run(*flags, "--overwrite_output").returncode == 2 and first.alive()
    os.kill(first.pid, signal.SIGTERM)
    done = kill(first, signal.SIGINT)
    assert done.returncode in (130, 143), done.stderr[-2000:]  # either may be the second
    assert "stopped at step" not in done.stdout


def test_killed_in_an_evaluation_it_goes_on_from_the_kept_answers(whole, tmp_path):
    out, flags = tmp_path / "run", (*FLAGS, *SAMPLED, "--report_to", "none")
    copy_killed(whole, out, STEPS)
    shutil.rmtree(out / "evaluation")
    for stage, total in (("before_one_shot_sampled", 14), ("after_zero_shot", 7)):
        job, file = Job(*flags, "--output_dir", out), f"evaluation/{stage}.parquet"
        wait_for(out, file, job)
        assert kill(job).returncode == -signal.SIGKILL
        kept = len(pd.read_parquet(out / file))
        assert 0 < kept < total
    # the kept ones are not generated again; nothing is left to train
    printed = finish(*flags, "--output_dir", out)
    assert re.search(rf"after_zero_shot: {7 - kept} \D*\b{kept} ", printed), printed
    assert len([*out.glob("evaluation/*.parquet")]) == 6
    check_same(whole, out)


def test_ended_between_a_checkpoint_and_its_list_of_files_it_has_the_one_before(whole, tmp_path):
    out = tmp_path / "run"
    flags = (*QUICK, "--max_steps", STEPS, "--save_total_limit", 1, "--output_dir", out)
    (out / "checkpoint-3/sizes.part").mkdir(parents=True)  # the list cannot be written there
    assert run(*flags).returncode == 1 and (out / "checkpoint-3/trainer_state.json").exists()
    (out / "checkpoint-3/sizes.part").rmdir()
    assert "checkpoint-2\n" in finish(*flags)
    assert find_steps(out) == [STEPS]
    check_same(whole, out)


def test_damage_is_passed_over(whole, tmp_path):
    folder = tmp_path / "each/checkpoint-3"
    for name, damage in product(FILES, (Path.unlink, cut)):
        shutil.copytree(whole / f"checkpoint-{STEPS}", folder)
        shutil.copytree(folder, folder.with_name("checkpoint-3-before-my-edit"))
        assert newest_checkpoint(folder.parent) == str(folder)
        damage(folder / name)
        assert newest_checkpoint(folder.parent) is None
        shutil.rmtree(folder.parent)
    out = tmp_path / "run"
    copy_killed(whole, out, STEPS)
    for name in ("checkpoint-foo", "checkpoint-999"):
        (out / name).mkdir()
    (out / f"checkpoint-{STEPS}/optimizer.pt").unlink()
    cut(out / "evaluation/before_zero_shot.parquet")
    (out / "evaluation/before_one_shot.parquet").write_bytes(b"")
    printed = finish(*FLAGS, "--report_to", "none", "--output_dir", out)
    assert f"checkpoint-{STEPS - 1}\n" in printed and (out / "checkpoint-999").exists()
    check_same(whole, out)


EPOCHS = "--max_steps -1 --dataset_name {few} --num_train_epochs 2"  # 10 questions
HALF = "--per_device_train_batch_size 8 --gradient_accumulation_steps 2 --steps_per_generation 1"
TWICE = "--num_iterations 2 --per_device_train_batch_size 8 --steps_per_generation 2"
TWICE += " --loss_type dapo --bf16 True --dtype bfloat16 --learning_rate 1e-2"
DROP = "--use_peft --lora_dropout 0.5 --gradient_checkpointing True --max_steps 2"
RESUMED = {  # flags; the steps that are saved; those after which the run is killed
    "second epoch, a step with one batch of two": (f"{EPOCHS} {HALF}", [*range(1, 7)], [3, 4]),
    "completions used for four steps": (f"{TWICE} --max_steps 9 --save_steps 3", [4, 8, 9], [7]),
    "logs in memory": ("--evaluate True --logging_steps 2 --max_steps 3", [1, 2, 3], [1]),
    "dropout's random state": (DROP, [1, 2], [1]),
}


@pytest.mark.parametrize("what", RESUMED)
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, what):
    (flags, saved, steps), whole, few = RESUMED[what], tmp_path / "whole", tmp_path / "few"
    lines = Path("assets/tiny/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few.mkdir()
    (few / "train.jsonl").write_text("".join(lines[:10]), encoding="utf-8")
    flags = [*QUICK, *flags.format(few=few).split()]
    finish(*flags, "--output_dir", whole)
    assert find_steps(whole) == saved[::-1]
    for step in steps:
        copy_killed(whole, tmp_path / f"{step}", step)
        last = max(x for x in saved if x <= step)
        assert f"checkpoint-{last}\n" in finish(*flags, "--output_dir", tmp_path / f"{step}")
        check_same(whole, tmp_path / f"{step}")


def test_lora_goes_on_from_an_adapter_and_resumes_bit_for_bit(tmp_path):
    flags = (*QUICK, "--evaluate", "True", "--learning_rate", "1e-3")
    old, whole, out = (tmp_path / name for name in ("old", "whole", "run"))
    # with dropout the first KL is not quite 0
    finish(*flags, "--use_peft", "--lora_dropout", 0, "--max_steps", 1, "--output_dir", old)
    flags = (*flags, "--model_name_or_path", old, "--max_steps", 3)
    finish(*flags, "--output_dir", whole)
    before, after = (f"evaluation/{when}_zero_shot.parquet" for when in ("before", "after"))
    adapter = json.loads((old / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 64)
    assert set(adapter["target_modules"]) == set(grpo_demo.LORA_TARGET_MODULES)
    assert not (old / "model.safetensors").exists()
    assert pd.read_parquet(whole / before).equals(pd.read_parquet(old / after))  # starts from old
    assert logged(whole)[0]["kl"] == 0  # and is its own reference
    assert not any(torch.equal(x, weights(whole)[name]) for name, x in weights(old).items())
    copy_killed(whole, out, 2)
    assert "checkpoint-2\n" in finish(*flags, "--output_dir", out)
    check_same(whole, out)


def described(out: Path, *flags: object) -> dict[str, str]:
    """Return what `describe` says of a command, without running it."""
    flags = [*QUICK, *("--output_dir", out), *flags]
    args, model_args = grpo_demo.parse_args([*map(str, flags)])
    rows = grpo_demo.load_questions(args, "train")
    return describe(args, model_args, grpo_demo.build_trainer(args, model_args, rows))


def replace(name: str, old: str, new: str, count: int = 1):
    def change(tiny: Path) -> None:
        text = (tiny / name).read_text(encoding="utf-8")
        assert re.search(old, text), text[:500]
        (tiny / name).write_text(re.sub(old, new, text, count=count), encoding="utf-8")

    return change


def nudge(tiny: Path) -> None:
    """Change one bit of a weight."""
    tensors = bytearray((tiny / "model.safetensors").read_bytes())
    tensors[-4] ^= 1
    (tiny / "model.safetensors").write_bytes(tensors)


TODAY = "{{ strftime_now('%d %b %Y %f') }}"
SWAP = (r'"([a-z]+)": (\d+),(\s+)"([a-z]+)": (\d+),', r'"\1": \5,\3"\4": \2,')
CHANGES = {  # what is changed, and the names of what must differ
    "nothing": (lambda tiny: None, set()),
    "a bit of a weight": (nudge, {"weights"}),
    "a field of the model": (replace("config.json", '"rms_norm_eps": ', r"\g<0>1"), {"model"}),
    "today's date": (replace("chat_template.jinja", "^", TODAY), {"prompts"}),
    "numbers of two tokens": (replace("tokenizer.json", *SWAP), {"prompts"}),
    "a stop token": (replace("generation_config.json", "2", "[2, 3]"), {"stop tokens"}),
    "a question": (replace("train.jsonl", "How many", "Count"), {"prompts", "other columns"}),
    "a gold answer": (replace("train.jsonl", r"#### \d+", "#### 7"), {"other columns"}),
    "an own column": (replace("train.jsonl", "{", '{"level": 1, ', 0), {"other columns"}),
    "the launcher's precision": (lambda tiny: None, {"precision"}),
}


def test_what_is_used_is_compared_not_its_path(tmp_path, monkeypatch):
    before = described(tmp_path / "out")
    for number, (what, (change, names)) in enumerate(CHANGES.items()):
        tiny = tmp_path / f"tiny{number}"
        shutil.copytree("assets/tiny", tiny)
        change(tiny)
        precision = "bf16" if names == {"precision"} else "no"
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        where = ("--model_name_or_path", tiny, "--dataset_name", tiny)
        now = described(tmp_path / "another", *where)
        assert {x for x in before | now if before.get(x) != now.get(x)} == names, what


def test_it_resumes_at_another_path_with_other_memory_settings(whole, tmp_path):
    out, tiny = tmp_path / "run", tmp_path / "tiny"
    shutil.copytree("assets/tiny", tiny)
    copy_killed(whole, out, STEPS - 1)
    more = "--per_device_train_batch_size 4 --gradient_accumulation_steps 4"
    more += f" --gradient_checkpointing True --model_name_or_path {tiny} --dataset_name {tiny}"
    flags = (*QUICK, "--max_steps", STEPS, *more.split(), "--output_dir", out)
    assert f"checkpoint-{STEPS - 1}\n" in finish(*flags)
    left, right = weights(whole), weights(out)
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


CODE = {
    "own_rewards.py": "from parts.sign import SIGN  # a comment\n",
    "parts/sign.py": "SIGN = +1\n",
    "not_imported.py": "SIGN = +1\n",
}
EDITS = [("own_rewards.py", "  # a", "\n\n# no", True), ("parts/sign.py", "+", "-", False)]
EDITS += [("not_imported.py", "+", "-", True)]


def test_code_beside_the_script_is_compared(tmp_path, monkeypatch):
    """A copy of resume.py takes its own folder for the project."""
    monkeypatch.syspath_prepend(tmp_path)
    for folder in ("assets", "parts"):
        (tmp_path / folder).mkdir()
    shutil.copy("assets/resume.py", tmp_path / "assets")
    for name, text in CODE.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    read_code = runpy.run_path(str(tmp_path / "assets/resume.py"))["read_code"]
    assert read_code() == []
    __import__("own_rewards")
    before = read_code()
    for name, old, new, same in EDITS:
        (tmp_path / name).write_text(CODE[name].replace(old, new), encoding="utf-8")
        assert (read_code() == before) == same, name
        (tmp_path / name).write_text(CODE[name], encoding="utf-8")


def test_all_settings_are_compared_but_for_those_of_free(tmp_path):
    kinds = (grpo_demo.DemoConfig, grpo_demo.ModelConfig)
    names = {f.name for kind in kinds for f in dataclasses.fields(kind) if f.init}
    free = {name for name in names for pattern in FREE.split() if fnmatch(name, pattern)}
    assert len(free) < 70 < 150 < len(names)
    assert names - described(tmp_path / "run").keys() == free


def test_what_an_output_directory_is(tmp_path):
    def state(now: str = "1", overwrite: bool = False) -> str:
        args = SimpleNamespace(output_dir=tmp_path / "run", overwrite_output=overwrite)
        return decide(args, {"beta": now})[0]

    file = tmp_path / "run/run.json"
    assert state() == "new"
    (tmp_path / "run/eval-1234").mkdir(parents=True)
    for name in ("run.part", "eval-1234/evaluation.json"):
        (tmp_path / "run" / name).write_text("")
    assert state() == "new"  # what the script leaves before a run begins
    (tmp_path / "run/notes.txt").write_text("dear diary")
    assert state() == state(overwrite=True) == "refused"
    for text in ("", "{", "[]", "3", '{"settings": 3}', "\xff"):
        file.write_text(text, encoding="latin-1")
        assert (state(), state(overwrite=True)) == ("refused", "new")
    for overwrote in (False, True):
        record = {"settings": {"beta": "1"}, "wandb_id": "x", "overwrote": overwrote}
        for finished in (False, True):
            write_json(file, record | {"finished": finished})
            assert state() == ("finished" if finished else "resumable")
            assert state("2") == "refused" and state("2", overwrite=True) == "new"
            # the same command, killed after it has moved an old run aside, does not start again
            begun = overwrote and not finished
            assert state(overwrite=True) == ("resumable" if begun else "new")
    assert json.loads(file.read_text()) == record | {"finished": True}


def test_nothing_that_was_there_is_lost(whole, tmp_path):
    # W&B's service writes its last line to debug-core.log after the run has ended
    files = {f: f.stat().st_mtime_ns for f in whole.rglob("*") if f.name != "debug-core.log"}
    finish(*FLAGS, "--output_dir", whole)
    done = run(*FLAGS, "--output_dir", whole, "--beta", "0.1", "--seed", "3")
    assert done.returncode == 2 and "beta 0.04 -> 0.1" in done.stderr and "42 -> 3" in done.stderr
    assert files == {f: f.stat().st_mtime_ns for f in files}
    assert len(files) + 1 == len([*whole.rglob("*")])
    out, flags = tmp_path / "run", (*QUICK, "--max_steps", 1, "--overwrite_output")
    out.mkdir()
    (out / "notes.txt").write_text("dear diary")
    assert run(*flags, "--output_dir", out).returncode == 2
    assert [f.name for f in tmp_path.rglob("*")] == ["run", "notes.txt"]
    (out / "notes.txt").rename(out / "run.json")  # the damaged record of a run
    finish(*flags, "--output_dir", out)
    (aside,) = tmp_path.glob("run.*")
    assert (aside / "run.json").read_text() == "dear diary" and (out / "checkpoint-1").exists()


def test_a_full_disk(whole, tmp_path):
    disk = tmp_path / "run"
    flags = (*FLAGS, "--evaluate", "False", "--output_dir", disk)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk), "-o"]
    if not shutil.which("mount") or subprocess.run([*mount, "size=22m"]).returncode:
        pytest.skip("needs the right to mount a small file system (root)")
    try:
        done = run(*flags)
        assert done.returncode == 2 and "disk is full" in done.stderr, done.stderr[-2000:]
        subprocess.run([*mount, "remount,size=80m"], check=True)
        assert "resuming from" in finish(*flags)
        check_same(whole, disk)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)])


def pair(*flags: object) -> list[Job]:
    """Start a process on each of two machines, here one, as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return [Job(*flags, env=env | {"RANK": rank, "GROUP_RANK": rank}) for rank in "01"]


def test_two_machines_share_the_evaluation_stop_at_the_same_step_and_resume(whole, tmp_path):
    """The signal reaches the second one only."""
    flags = (*SMALL, "--per_device_train_batch_size", 8, "--max_steps", 6, "--save_steps", 2)
    undisturbed, out = tmp_path / "whole", tmp_path / "run"
    first, second = (job.wait() for job in pair(*flags, "--output_dir", undisturbed))
    assert first.returncode == second.returncode == 0, first.stderr[-2000:]
    assert "16 completions in groups of 4" in first.stdout and "groups" not in second.stdout
    assert max(series(wandb_rows(undisturbed), "train/global_step")) == 6
    file = "evaluation/before_zero_shot.parquet"  # shared, gathered, in order
    assert pd.read_parquet(undisturbed / file).equals(pd.read_parquet(whole / file))
    flags = (*flags, "--evaluate", "False", "--report_to", "none", "--output_dir", out)
    jobs = pair(*flags)
    wait_for(out, "checkpoint-2/sizes.json", jobs[0])
    os.kill(jobs[1].pid, signal.SIGTERM)
    assert [job.wait().returncode for job in jobs] == [143, 143]
    assert not (out / "checkpoint-6").exists()
    assert len([*Path(newest_checkpoint(out)).glob("rng_state_?.pth")]) == 2
    first, second = (job.wait() for job in pair(*flags))
    assert first.returncode == second.returncode == 0, first.stderr[-2000:]
    assert "resuming from" in first.stdout and "resuming" not in second.stdout
    check_same(undisturbed, out)
