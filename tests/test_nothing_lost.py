"""Kill it, cut it off, starve it: real processes, signals, a full disk, a server that fails."""

import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import (
    LAPTOP,
    ROOT,
    TWO,
    Job,
    check_steps,
    command,
    history,
    note,
    run,
    series,
    wandb_rows,
)
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState

import grpo_demo
from assets import evaluate
from assets.common import UserError
from assets.research.record import collect
from assets.resume import claim_output, is_complete, newest_checkpoint
from assets.terminal import Health
from rewards import REWARD_FUNCS

SMALL = (
    *(*LAPTOP, "--per_device_train_batch_size", 16, "--num_generations", 4),
    *("--max_completion_length", 48, "--eval_samples", 16, "--log_completions", "False"),
)
STEPS = 14
FLAGS = (*SMALL, "--max_steps", STEPS, "--save_steps", 1)
BRIEF = (*SMALL, "--evaluate", "False", "--save_strategy", "no")
KILLS = int(os.environ.get("KILLS", 6))
MEASURED = ["before_zero_shot", "before_one_shot", "after_zero_shot"]


def same(a: Path, b: Path, name: str = "model.safetensors") -> bool:
    """Return whether two runs ended in the same weights, bit for bit, and the same evaluation."""
    left, right = load_file(a / name), load_file(b / name)
    weights = left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    figures = [json.loads((out / "evaluation.json").read_text())["measurements"] for out in (a, b)]
    return weights and figures[0] == figures[1]


def check_wandb(out: Path, steps: int) -> None:
    """Check that every step is in the W&B files, and that a repeated step has the same values."""
    files = sorted(out.glob("wandb/*run-*/*.wandb"))
    assert len({f.name for f in files}) == 1  # all lives of a run share its id
    check_steps([row for file in files for row in history(file)], steps)


def wait_for(out: Path, pattern: str, job: Job) -> None:
    while not list(out.glob(pattern)):
        assert job.alive(), job.wait().stderr[-2000:]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run that all others must equal."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(*FLAGS, "--output_dir", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def newest(out: Path) -> tuple[float, bool]:
    """Return when the newest checkpoint was begun, and whether one is being written."""
    try:
        folders = list(out.glob("checkpoint-*"))
        begun = max((f.stat().st_mtime for f in folders), default=0)
        return begun, any(not Path(f, "trainer_state.json").exists() for f in folders)
    except FileNotFoundError:  # an old one was just deleted
        return 0, False


def test_killed_many_times_it_ends_the_same(whole, tmp_path):
    out, chance, kills, while_writing = tmp_path / "run", random.Random(0), 0, 0
    for _ in range(60):
        job, begun = Job(*FLAGS, "--output_dir", out), time.time()
        patience, wait_for_write = chance.uniform(0.0, 0.25), kills % 3 == 0
        while job.alive() and kills < KILLS:
            last, writing = newest(out)
            if last > begun and (writing if wait_for_write else time.time() - last > patience):
                os.kill(job.pid, signal.SIGKILL)
                kills, while_writing = kills + 1, while_writing + writing
                break
            time.sleep(0.001)
        if (done := job.wait()).returncode == 0:
            break
    print(f"killed {kills} times, {while_writing} of them while a checkpoint was being written")
    assert kills >= KILLS and while_writing >= 1 and done.returncode == 0
    assert same(whole, out)
    check_wandb(out, STEPS)
    note(f"SIGKILL, {while_writing} of them while a checkpoint was written", kills, kills, 0)


# Two questions a batch, and two sampled answers a question: 8 and 16 batches each time
BATCHES = ("--per_device_eval_batch_size", 2, "--eval_generations", 2)
ANSWERS = [f"{when}{kind}" for when in MEASURED for kind in ("", "_sampled")]


@pytest.fixture(scope="module")
def sampled(whole, tmp_path_factory):
    """The uninterrupted run with sampled answers in its evaluations, made from `whole`."""
    out = tmp_path_factory.mktemp("sampled") / "run"
    shutil.copytree(whole, out, symlinks=True, ignore=shutil.ignore_patterns("evaluation*"))
    unfinish(out)
    done = run(*FLAGS, *BATCHES, "--output_dir", out)
    assert done.returncode == 0 and same(whole, out), done.stderr[-2000:]
    return out


@pytest.mark.parametrize("stage", ["before_zero_shot", "before_one_shot_sampled", *ANSWERS[4:]])
def test_killed_in_an_evaluation_it_goes_on_from_the_kept_answers(sampled, tmp_path, stage):
    """The first stage begins a new run, the others begin at its last checkpoint."""
    out, total = tmp_path / "run", 32 if stage.endswith("sampled") else 16
    done_before = ANSWERS[: ANSWERS.index(stage)]
    if done_before:
        shutil.copytree(sampled, out, symlinks=True)
        for name in ANSWERS[len(done_before) :]:
            (out / f"evaluation/{name}.parquet").unlink()
        (out / "evaluation.json").unlink()
        unfinish(out)
    job = Job(*FLAGS, *BATCHES, "--output_dir", out)
    wait_for(out, f"evaluation/{stage}.parquet", job)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait().returncode == -signal.SIGKILL
    assert {f.stem for f in out.glob("evaluation/*.parquet")} == {*done_before, stage}
    kept = pd.read_parquet(out / f"evaluation/{stage}.parquet")
    assert 0 < len(kept) < total
    done = run(*FLAGS, *BATCHES, "--output_dir", out)
    assert done.returncode == 0 and same(sampled, out), done.stderr[-2000:]
    kind = "sample" if stage.endswith("sampled") else "evaluate"
    rest = f"{kind} {stage.removesuffix('_sampled')}: {total - len(kept)} answers in"
    assert rest in done.stdout  # the others are not generated again
    answers = {
        name: [pd.read_parquet(f / f"evaluation/{name}.parquet") for f in (sampled, out)]
        for name in ANSWERS
    }
    assert all(wanted.equals(found) for wanted, found in answers.values())
    assert kept.equals(answers[stage][1][: len(kept)])
    note(f"SIGKILL in the evaluation {stage}", 1, 1, 0)


def unfinish(out: Path) -> None:
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"finished": False}))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_first(whole, tmp_path, number, status):
    out = tmp_path / "run"
    flags = (*FLAGS, "--save_steps", 4, "--output_dir", out)
    job = Job(*flags)
    wait_for(out, "checkpoint-4/sizes.json", job)
    os.kill(job.pid, number)
    done = job.wait()
    assert done.returncode == status, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("stopped at step")]
    step = int(line.split()[3].rstrip(":;"))
    assert (out / f"checkpoint-{step}" / "trainer_state.json").exists() and 4 <= step < STEPS
    done = run(*flags)
    assert done.returncode == 0 and f"resuming from {out}/checkpoint-{step}" in done.stdout
    assert same(whole, out)
    check_wandb(out, STEPS)
    (sync,) = [line for line in done.stdout.splitlines() if line.startswith("wandb sync ")]
    assert len(sync.split("--include-online ")[1].split()) == 2
    metrics, _, started = collect(out)  # the record of such a run has one clock
    clock = [m["runtime"] for m in metrics]
    assert started["resumed"] == 1 and len(clock) == STEPS and clock == sorted(clock)
    note(signal.Signals(number).name, 1, 1, 0)


def test_killed_before_a_checkpoint_is_complete_the_only_other_one_is_still_there(whole, tmp_path):
    flags = (*FLAGS, "--save_total_limit", 1, "--output_dir", tmp_path / "run")
    kill = """
import os, pathlib, signal, sys, torch, grpo_demo
from assets import resume
torch.set_num_threads(1)  # as the others
def kill_or_write(file, value, write=resume.write_json):
    if pathlib.Path(file).parts[-2:] == ("checkpoint-3", resume.SIZES):
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, value)
resume.write_json = kill_or_write
grpo_demo.main(sys.argv[1:])"""
    done = subprocess.run([sys.executable, "-c", kill, *map(str, flags)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    done = run(*flags)
    assert done.returncode == 0 and "checkpoint-2\n" in done.stdout, done.stderr[-2000:]
    assert [f.name for f in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert same(whole, tmp_path / "run")
    note("SIGKILL between a checkpoint and the list of its files", 1, 1, 0)


def test_ctrl_c_while_packages_load_is_no_traceback(tmp_path):
    flags = [*LAPTOP, "--output_dir", str(tmp_path / "run")]
    job = subprocess.Popen([sys.executable, "grpo_demo.py", *flags], stderr=-1, text=True)
    while "libtorch" not in Path(f"/proc/{job.pid}/maps").read_text():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    assert job.communicate(timeout=60)[1] == "" and job.returncode == -signal.SIGINT


def test_a_second_signal_stops_at_once(tmp_path):
    out = tmp_path / "run"
    job = Job(*FLAGS, "--evaluate", "False", "--output_dir", out)
    wait_for(out, "checkpoint-1/sizes.json", job)
    os.kill(job.pid, signal.SIGTERM)
    os.kill(job.pid, signal.SIGINT)
    done = job.wait()
    assert done.returncode in (130, 143), done.stderr[-2000:]  # either may be the second
    assert "stopped at step" not in done.stdout and "stopped;" in done.stderr


def test_lora_goes_on_from_an_adapter_and_resumes_bit_for_bit(tmp_path):
    flags, old = (*SMALL, "--learning_rate", "1e-3", "--save_steps", 2), tmp_path / "old"
    peft = ("--use_peft", "--lora_dropout", 0)  # with dropout the first KL is not quite 0
    done = run(*flags, *peft, "--max_steps", 2, "--output_dir", old)
    assert done.returncode == 0, done.stderr[-2000:]
    flags = (*flags, "--model_name_or_path", old, "--max_steps", 4)
    done = run(*flags, "--output_dir", tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-2000:]
    ends = [old / "evaluation/after_zero_shot.parquet"]
    ends += [tmp_path / "whole/evaluation/before_zero_shot.parquet"]
    assert pd.read_parquet(ends[0]).equals(
        pd.read_parquet(ends[1])
    )  # it begins where the old ended
    assert series(wandb_rows(tmp_path / "whole"), "train/kl")[0] == 0  # and is its own reference
    weights = [load_file(f / "adapter_model.safetensors") for f in (old, tmp_path / "whole")]
    assert weights[0].keys() == weights[1].keys()
    assert not any(torch.equal(*pair) for pair in zip(*(w.values() for w in weights), strict=True))
    job = Job(*flags, "--output_dir", tmp_path / "run")
    wait_for(tmp_path / "run", "checkpoint-2/sizes.json", job)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    done = run(*flags, "--use_peft", "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and "use_peft False -> True" in done.stderr
    done = run(*flags, "--output_dir", tmp_path / "run")
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]
    assert same(tmp_path / "whole", tmp_path / "run", "adapter_model.safetensors")
    note("SIGKILL of a LoRA run", 1, 1, 0)


def test_what_an_output_directory_may_hold(whole, tmp_path):
    # W&B's service writes its last line to debug-core.log after the run has ended
    # and the lock is for the life of a process
    mine = ("debug-core.log", ".lock", ".owner")
    names = [f for f in whole.rglob("*") if f.name not in mine]
    files = {f: f.stat().st_mtime_ns for f in names}
    done = run(*FLAGS, "--output_dir", whole)
    assert done.returncode == 0 and "is finished, nothing to do" in done.stdout
    done = run(*FLAGS, "--output_dir", whole, "--beta", "0.1", "--seed", "3")
    assert done.returncode == 2 and "beta 0.04 -> 0.1" in done.stderr and "42 -> 3" in done.stderr
    done = run(*FLAGS, "--max_steps", STEPS + 1, "--output_dir", whole)
    further = f"--model_name_or_path {whole} --output_dir {whole}-2"
    assert done.returncode == 2 and done.stderr.rstrip().endswith(f"add: {further}")
    assert files == {f: f.stat().st_mtime_ns for f in names}  # not touched
    assert len(names) + 1 == len([f for f in whole.rglob("*") if f.name not in mine[1:]])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("dear diary")
    done = run(*FLAGS, "--output_dir", mine)
    assert done.returncode == 2 and "holds other files" in done.stderr
    assert [f.name for f in mine.iterdir()] == ["notes.txt"]
    again = (*BRIEF, "--max_steps", 1, "--output_dir", mine, "--overwrite_output")
    done = run(*again)
    (aside,) = tmp_path.glob("mine.*")
    assert done.returncode == 0 and (aside / "notes.txt").read_text() == "dear diary"
    unfinish(mine)  # the same command after a kill does not move its own run aside
    done = run(*again)
    assert done.returncode == 0 and len(list(tmp_path.glob("mine.*"))) == 1
    done = run(*again)  # but a finished one
    assert done.returncode == 0 and len(list(tmp_path.glob("mine.*"))) == 2


def test_a_mended_rewards_file_finishes_a_run_whose_training_is_done(whole, tmp_path):
    """As after an error in the last evaluation: kept answers are scored by the new file."""
    out, first = tmp_path / "run", Path("evaluation/before_zero_shot.parquet")
    shutil.copytree(whole, out, symlinks=True)
    record = json.loads((out / "run.json").read_text())
    record["settings"]["rewards.py"] = "the faulty one"
    (out / "run.json").write_text(json.dumps(record | {"finished": False}))
    pd.read_parquet(out / first).assign(lenient_accuracy=False).to_parquet(out / first)
    (out / "evaluation/after_zero_shot.parquet").unlink()
    shutil.copytree(out, tmp_path / "begun", symlinks=True)
    done = run(*FLAGS, "--output_dir", out)
    assert done.returncode == 0 and "rewards.py has changed" in done.stderr, done.stderr[-2000:]
    assert same(whole, out)
    shutil.rmtree(tmp_path / f"begun/checkpoint-{STEPS}")
    done = run(*FLAGS, "--output_dir", tmp_path / "begun")
    assert done.returncode == 2 and "(rewards.py has changed)" in done.stderr


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("damage", [Path.unlink, cut], ids=["missing", "cut"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_seen(whole, tmp_path, name, damage):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(whole / f"checkpoint-{STEPS}", folder)
    assert is_complete(folder)
    damage(folder / name)
    assert not is_complete(folder)


def test_a_copy_of_a_checkpoint_is_none(whole, tmp_path):
    for name in ("checkpoint-3", "checkpoint-3-before-my-edit", "checkpoint-old"):
        shutil.copytree(whole / f"checkpoint-{STEPS}", tmp_path / name)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_directory_in_use_is_left_alone(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    args = SimpleNamespace(output_dir=str(mine), overwrite_output=True, process_index=0)
    mine.mkdir()
    (mine / "run.json").write_text("{")  # damaged
    with suppress(ZeroDivisionError), claim_output(args, {}):
        raise ZeroDivisionError
    other.mkdir()
    with FileLock(other / ".lock"):
        args.output_dir = str(other)
        with pytest.raises(UserError, match="in use"), claim_output(args, {}):
            pass
        assert (other / ".lock").exists()
    (aside,) = tmp_path.glob("mine.*")
    assert not mine.exists() and [file.name for file in aside.iterdir()] == ["run.json"]


def test_another_error_than_a_full_disk_is_passed_on(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), overwrite_output=False, process_index=0)
    with pytest.raises(UserError, match="cannot load"), claim_output(args, {}):
        raise UserError("cannot load the model: No space left on device")


def test_damage_is_passed_over(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    (out / "model.safetensors").unlink()
    unfinish(out)
    for name in ("checkpoint-foo", "checkpoint-999"):
        (out / name).mkdir()
    (out / f"checkpoint-{STEPS}/optimizer.pt").unlink()
    cut(out / "evaluation/before_zero_shot.parquet")
    (out / "evaluation/before_one_shot.parquet").write_bytes(b"")
    done = run(*FLAGS, "--output_dir", out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "checkpoint-999 is incomplete" in done.stderr
    assert f"checkpoint-{STEPS} is incomplete" in done.stderr
    assert done.stderr.count("is damaged, measured again") == 2
    assert f"resuming from {out}/checkpoint-{STEPS - 1}" in done.stdout and same(whole, out)
    note("damage: five files of a checkpoint, missing or cut; evaluations; odd folders", 14, 14, 0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3}', "\xff"])
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    done = run(*BRIEF, "--output_dir", tmp_path)
    assert done.returncode == 2 and "has a damaged run.json" in done.stderr


def test_one_run_at_a_time(tmp_path):
    flags = (*BRIEF, "--max_steps", 40, "--output_dir", tmp_path / "run")
    first = Job(*flags)
    wait_for(tmp_path, "run/run.json", first)
    for more in ((), ("--seed", 3), ("--overwrite_output",)):
        done = run(*flags, *more)
        assert done.returncode == 2 and f"in use by process {first.pid} on " in done.stderr
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = Job(*flags)
    wait_for(tmp_path, "run/wandb/*run-*/*.wandb", second)  # free after a kill
    os.kill(second.pid, signal.SIGKILL)
    note("a second process with the same output directory", 3, 3, 0)


def test_a_run_resumes_with_other_memory_settings(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    unfinish(out)
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    smaller = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4)
    more = ("--gradient_checkpointing", "True", "--dataloader_num_workers", 1)
    done = run(*FLAGS, *smaller, *more, "--output_dir", out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resuming from {out}/checkpoint-{STEPS - 1}" in done.stdout
    left, right = (load_file(f / "model.safetensors") for f in (whole, out))
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


def test_another_model_at_the_same_path_is_seen(tmp_path):
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree("assets/tiny", model)
    flags = (*BRIEF, "--max_steps", 1, "--model_name_or_path", model, "--output_dir", out)
    assert run(*flags).returncode == 0
    unfinish(out)
    os.utime(model / "model.safetensors", (1, 1))
    done = run(*flags)
    assert done.returncode == 0, done.stderr  # the content counts
    unfinish(out)
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, model / "model.safetensors")
    done = run(*flags)
    assert done.returncode == 2 and "(model file model.safetensors has changed" in done.stderr


def test_two_checkpoints_are_kept(whole):
    names = {f.name for f in whole.glob("checkpoint-*")}
    assert names == {f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"}


def mounted(folder: Path, size: str, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    options = ",".join([*options, f"size={size}"])
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0


def test_a_full_disk(whole, tmp_path):
    disk = tmp_path / "disk"
    if not mounted(disk, "22m"):
        pytest.skip("needs the right to mount a small file system (root)")
    try:
        done = run(*FLAGS, "--output_dir", disk / "run")
        assert done.returncode == 1, done.stdout[-500:] + done.stderr[-2000:]
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert "disk full" in line and "MB are free" in line
        assert mounted(disk, "80m", "remount")
        done = run(*FLAGS, "--output_dir", disk / "run")
        assert done.returncode == 0 and "resuming from" in done.stdout and same(whole, disk / "run")
        note("a full disk while saving", 1, 1, 0)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], capture_output=True)


class Server(http.server.BaseHTTPRequestHandler):
    """A W&B server that lets a run begin and then fails in one of several ways."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen += 1
        if self.server.mode == "hang" or (
            self.server.mode == "drop" and b"upsertBucket" not in body and self.server.begun
        ):
            time.sleep(600 if self.server.mode == "hang" else 0)
            self.close_connection = True
            return
        user = {"id": "u", "username": "u", "entity": "u", "flags": "{}", "teams": {"edges": []}}
        project = {"name": "grpo-demo", "entity": {"name": "u"}}
        bucket = {
            "id": "b",
            "name": "r",
            "displayName": "r",
            "config": "{}",
            "sweepName": "",
            "project": project,
        }
        if b"upsertBucket" in body:
            sent = json.loads(body)["variables"]
            bucket["name"] = sent["name"]
            self.server.hosts.append(sent.get("host"))
        data = {"viewer": user, "serverInfo": {"features": []}, "model": {"bucket": None}}
        data |= {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
        self.server.begun = self.server.begun or b"upsertBucket" in body
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *args):
        pass


SERVERS = {
    "refuse": "a W&B server that refuses",
    "hang": "a W&B server that never answers",
    "drop": "a W&B server that drops the run",
}


@pytest.fixture(scope="module", autouse=True)
def servers(tmp_path_factory):
    """Start a run with each server; they mostly wait, while the other tests of this file run."""
    started = {}
    for mode in SERVERS:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        server.mode, server.seen, server.begun, server.daemon_threads = mode, 0, False, True
        server.hosts = []
        url = f"http://127.0.0.1:{server.server_address[1]}"
        if mode == "refuse":
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": "0123456789" * 4}
        out = tmp_path_factory.mktemp(mode) / "run"
        started[mode] = Job(*BRIEF, "--max_steps", 4, "--output_dir", out, env=env), out, server
    return started


def test_no_secret_is_written(tmp_path):
    secrets = {"WANDB_API_KEY": "5ecre7" * 6 + "abcd", "HF_TOKEN": "hf_" + "S3cr3tT0k3n" * 3}
    out = tmp_path / "run"
    done = run(*SMALL, "--max_steps", 2, "--save_steps", 1, "--output_dir", out, env=secrets)
    assert done.returncode == 0, done.stderr[-2000:]
    texts = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    found = [f for f, text in texts.items() if any(s.encode() in text for s in secrets.values())]
    note("bytes of two planted secrets searched for in all files", "all", "", f"{len(found)} found")
    assert found == [] and not any(s in done.stdout + done.stderr for s in secrets.values())


def test_silent_failures_speak(tmp_path):
    short = ("--per_device_train_batch_size", 8, "--max_completion_length", 6, "--max_steps", 52)
    flags = (*BRIEF, *short, "--output_dir", tmp_path / "a")
    done = run(*flags, "--reward_weights", 0, 0, 0, 0, 0)
    assert done.returncode == 0, done.stderr[-2000:]
    for text in ("reward variance", "most completions are cut off", "format rewards are still 0"):
        assert done.stderr.count(text) == 1, text


@pytest.mark.parametrize("rate", ["1e30", "1e38"])  # weights that overflow; not finite at once
def test_what_is_not_finite_stops_the_run_unsaved(tmp_path, rate):
    out = tmp_path / "run"
    wild = ("--learning_rate", rate, "--max_grad_norm", 0, "--warmup_steps", 4, "--max_steps", 9)
    done = run(*SMALL, "--evaluate", "False", *wild, "--save_steps", 1, "--output_dir", out)
    assert done.returncode == 1 and done.stderr.count("is not finite: stopping") == 1
    assert "lower --learning_rate and --overwrite_output" in done.stdout
    assert not (out / "model.safetensors").exists()
    assert [f.name for f in out.glob("checkpoint-*")] == ["checkpoint-1"]  # learning rate 0
    kept = load_file(out / "checkpoint-1" / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())


def test_steps_that_fp16_skips_do_not_end_the_run_at_once():
    """GradScaler skips a step that overflows and lowers its scale; 20 in a row are many."""
    args, _ = grpo_demo.parse_args([*LAPTOP])
    logs = {"reward": 1.0, "loss": 0.1, "frac_reward_zero_std": 0, "completions/clipped_ratio": 0}
    for args.fp16, patience in ((True, 20), (False, 0)):
        health = Health()
        state = TrainerState()
        control = TrainerControl()
        for overflow in [True] * 3 * args.fp16 + [False] + [True] * patience:
            norm = {"grad_norm": float("inf") if overflow else 0.5}
            health.on_log(args, state, control, logs=logs | norm)
            assert not control.should_training_stop
        health.on_log(args, state, control, logs=logs | {"grad_norm": float("nan")})
        assert control.should_training_stop


def test_a_collapsed_model_is_named_although_its_rewards_differ_by_rounding(capsys):
    """All rewards of a real Qwen's steps 34 to 60 are 1.476; TRL counts no group as equal."""
    record = ROOT / "assets/research/runs/qwen-half-b/metrics.jsonl"
    steps = [json.loads(line) for line in record.open()]
    assert not any(logs["frac_reward_zero_std"] for logs in steps)
    args, _ = grpo_demo.parse_args([*LAPTOP])
    health, state = Health(), TrainerState()
    for state.global_step, logs in enumerate(steps, 1):
        health.on_log(args, state, TrainerControl(), logs=logs)
        warned = "reward variance" in capsys.readouterr().err
        assert warned == (state.global_step == 53)


def check_out_of_memory(done: SimpleNamespace) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory" in line
    for flag in ("--gradient_checkpointing True", "--use_peft", "--max_completion_length"):
        assert flag in line


def test_out_of_memory_in_a_step_is_one_line(tmp_path):
    """The first layer of a step of 4,096 completions takes more than the half GB that is left."""
    large = ("--per_device_train_batch_size", 4096, "--num_generations", 16)
    flags = (*LAPTOP, *large, "--evaluate", "False", "--report_to", "none")
    done = run(*flags, "--output_dir", tmp_path / "run", spare=2**29)
    check_out_of_memory(done)
    assert "4096 completions" in done.stdout and (tmp_path / "run/run.json").exists()


def test_out_of_memory_while_the_model_is_loaded_is_one_line_and_leaves_no_file(tmp_path):
    """Its MLPs have a width of a million: 640 MB a matrix. They are not in the file: made anew."""
    model = tmp_path / "model"
    shutil.copytree("assets/tiny", model)
    config = json.loads((model / "config.json").read_text()) | {"intermediate_size": 1_000_000}
    (model / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    small = {name: value for name, value in weights.items() if ".mlp." not in name}
    save_file(small, model / "model.safetensors", metadata={"format": "pt"})
    flags = ("--model_name_or_path", model, "--output_dir", tmp_path / "run")
    check_out_of_memory(run(*LAPTOP, *flags, spare=2**29))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["a reward", "TRL", "the evaluation"])
def test_an_error_in_the_code_is_a_traceback(tmp_path, monkeypatch, place):
    """Not one line that blames the settings: a ValueError here is nobody's wrong flag."""

    def bug(*args, completions=(), **kwargs):
        if 0 < len(completions) < 64:  # the examples on which rewards are tried
            return [0.0] * len(completions)
        raise ValueError("a bug")

    bug.__name__ = "xmlcount_reward_func"
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of pytest stay
    if place == "a reward":
        monkeypatch.setattr(grpo_demo.rewards, "REWARD_FUNCS", [bug, *REWARD_FUNCS[1:]])
    elif place == "TRL":
        monkeypatch.setattr(grpo_demo.GRPOTrainer, "compute_loss", bug)
    else:
        monkeypatch.setattr(evaluate, "score", bug)
    flags = ["--report_to", "none", "--max_steps", "1", "--eval_samples", "4"]
    evaluated = str(place == "the evaluation")
    with pytest.raises(ValueError, match="a bug"):
        where = ["--evaluate", evaluated, "--output_dir", str(tmp_path / "run")]
        grpo_demo.main([*LAPTOP, *flags, *where])


def test_a_process_that_dies_takes_the_run_down_and_it_resumes(tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL, "--evaluate", "False", "--per_device_train_batch_size", 8, "--max_steps", 6]
    flags += ["--save_steps", 2, "--output_dir", out]
    line, pipe = [*TWO, "grpo_demo.py", *map(str, flags)], subprocess.PIPE
    process = subprocess.Popen(line, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT)
    while not (out / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    ranks = {p: Path(f"/proc/{p}/environ").read_bytes() for p in children.stdout.split()}
    (victim,) = [p for p, environ in ranks.items() if b"\0RANK=1\0" in b"\0" + environ]
    os.kill(int(victim), signal.SIGKILL)
    killed = time.time()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - killed < 60
    done = command(*flags, launcher=TWO)
    assert done.returncode == 0 and done.stdout.count("resuming from") == 1, done.stderr[-2000:]
    assert (out / "model.safetensors").exists()
    check_wandb(out, 6)
    note("one of two processes killed", 1, 1, 0)


@pytest.mark.parametrize("mode", SERVERS)
def test_a_wandb_server_that_fails(servers, mode):
    job, out, server = servers[mode]
    done = job.wait()
    server.shutdown() if mode != "refuse" else None
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert mode == "refuse" or server.seen > 0
    assert bool(server.hosts) == (mode == "drop") and not any(server.hosts)  # no host name
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("wandb sync ")]
    printed = [sys.executable, "-m", *line.split(), "--dry-run"]
    listed = subprocess.run(printed, capture_output=True, text=True)
    assert listed.returncode == 0 and "Skipped" not in listed.stdout + listed.stderr
    assert "Would sync 1 run" in listed.stdout + listed.stderr
    check_wandb(out, 4)
    note(SERVERS[mode], 1, 1, 0)
