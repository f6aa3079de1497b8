"""Kill it, cut it off, starve it: real processes, real signals, a real full disk, a server that fails."""

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
from pathlib import Path

import pytest
import torch
from conftest import ROOT, history, note, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import rewards
from assets.record import collect
from rewards import REWARD_FUNCS

SMALL = (
    "--config assets/tiny/config.yaml --per_device_train_batch_size 16 --num_generations 4 --max_completion_length 48"
)
SMALL = (*SMALL.split(), "--evaluate", "False", "--log_completions", "False")
KILLS = int(os.environ.get("KILLS", 10))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def start(*flags: object, launcher=(sys.executable,), env=None) -> subprocess.Popen:
    command = [*launcher, "grpo_demo.py", *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=os.environ | (env or {})
    )


def steps_in_wandb(out: Path) -> list[int]:
    """The steps whose metrics are in the W&B files of all lives of a run, in order; all files carry one run id."""
    files = sorted(out.glob("wandb/*run-*/*.wandb"))
    assert len({f.name for f in files}) == 1
    rows = [row for file in files for row in history(file)]
    return [row["train/global_step"] for row in rows if "train/reward" in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run that all others must equal."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(*SMALL, "--max_steps", 40, "--save_steps", 2, "--output_dir", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def is_being_written(out: Path) -> bool:
    return any(not Path(f, "trainer_state.json").exists() for f in out.glob("checkpoint-*"))


def test_killed_many_times_it_ends_the_same(whole, tmp_path):
    out, chance, kills, while_writing = tmp_path / "run", random.Random(0), 0, 0
    flags = (*SMALL, "--max_steps", 40, "--save_steps", 2, "--output_dir", out)
    for _ in range(60):
        process = start(*flags)
        begun, patience, wait_for_write = time.time(), chance.uniform(1.0, 4.0), kills % 3 == 0
        while process.poll() is None and kills < KILLS:
            newest = max((f.stat().st_mtime for f in out.glob("checkpoint-*")), default=0)
            writing, grown = is_being_written(out), newest > begun
            if (wait_for_write and grown and writing) or (
                not wait_for_write and grown and time.time() - newest > patience / 10
            ):
                process.send_signal(signal.SIGKILL)
                kills, while_writing = kills + 1, while_writing + writing
                break
            time.sleep(0.001)
        if process.wait(timeout=300) == 0:
            break
    print(f"killed {kills} times, {while_writing} of them while a checkpoint was being written")
    assert kills >= 10 and while_writing >= 1 and process.returncode == 0
    assert same(whole, out)
    assert steps_in_wandb(out) == list(range(1, 41))
    note(f"SIGKILL, {while_writing} of them while a checkpoint was being written", kills, kills, 0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_first(whole, tmp_path, number, status):
    out = tmp_path / "run"
    flags = (*SMALL, "--max_steps", 40, "--save_steps", 10, "--output_dir", out)
    process = start(*flags)
    while not list(out.glob("wandb/*run-*/*.wandb")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1.5)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == status, printed[-2000:]
    (line,) = [line for line in printed.splitlines() if line.startswith("stopped at step")]
    step = int(line.split()[3].rstrip(":;"))
    assert (out / f"checkpoint-{step}" / "trainer_state.json").exists() and 1 <= step < 40
    done = run(*flags)
    assert done.returncode == 0 and f"going on from {out}/checkpoint-{step}" in done.stdout, done.stderr[-2000:]
    assert same(whole, out) and steps_in_wandb(out) == list(range(1, 41))
    (sync,) = [line for line in done.stdout.splitlines() if line.startswith("upload the run:")]
    assert len(sync.split("wandb sync ")[1].split()) == 2
    metrics, _, started = collect(out)  # the record of such a run has one clock
    clock = [m["runtime"] for m in metrics]
    assert started["resumed"] == 1 and len(clock) == 40 and clock == sorted(clock)
    note(signal.Signals(number).name, 1, 1, 0)


def test_a_second_signal_stops_at_once(tmp_path):
    out = tmp_path / "run"
    process = start(*SMALL, "--max_steps", 40, "--save_steps", 10, "--output_dir", out)
    while not list(out.glob("wandb/*run-*/*.wandb")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode in (130, 143), printed[-2000:]  # both are here at once: either may be the second
    assert "stopped; the same command goes on from the last checkpoint" in printed
    assert "stopped at step" not in printed


def test_what_an_output_directory_may_hold(whole, tmp_path):
    flags = (*SMALL, "--max_steps", 40, "--save_steps", 2)
    files = {f: f.stat().st_mtime_ns for f in whole.rglob("*")}
    done = run(*flags, "--output_dir", whole)
    assert done.returncode == 0 and "is finished, nothing to do" in done.stdout
    done = run(*flags, "--output_dir", whole, "--beta", "0.1", "--seed", "3")
    assert done.returncode == 2 and "beta 0.04 -> 0.1" in done.stderr and "seed 42 -> 3" in done.stderr
    assert files == {f: f.stat().st_mtime_ns for f in whole.rglob("*")}  # not touched
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("dear diary")
    done = run(*flags, "--output_dir", mine)
    assert done.returncode == 2 and "holds something else" in done.stderr
    done = run(*flags[:-4], "--max_steps", 1, "--save_strategy", "no", "--output_dir", mine, "--overwrite_output")
    (aside,) = tmp_path.glob("mine.*")
    assert done.returncode == 0 and (aside / "notes.txt").read_text() == "dear diary", done.stderr[-2000:]


def test_a_half_written_checkpoint_is_passed_over(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    (out / "model.safetensors").unlink()
    (out / "run.json").write_text((out / "run.json").read_text().replace('"finished": true', '"finished": false'))
    state = out / "checkpoint-40" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    done = run(*SMALL, "--max_steps", 40, "--save_steps", 2, "--output_dir", out)
    assert done.returncode == 0 and f"{out}/checkpoint-40 is half written" in done.stderr, done.stderr[-2000:]
    assert f"going on from {out}/checkpoint-38" in done.stdout and same(whole, out)
    note("a half-written checkpoint", 1, 1, 0)


def test_two_checkpoints_are_kept(whole):
    assert sorted(f.name for f in whole.glob("checkpoint-*")) == ["checkpoint-38", "checkpoint-40"]


def mounted(folder: Path, size: str, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk(whole, tmp_path):
    disk = tmp_path / "disk"
    if not mounted(disk, "22m"):
        pytest.skip("needs the right to mount a small file system (root)")
    try:
        flags = (*SMALL, "--max_steps", 40, "--save_steps", 2, "--output_dir", disk / "run")
        done = run(*flags)
        assert done.returncode == 1, done.stdout[-500:] + done.stderr[-2000:]
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert "disk full: a checkpoint takes about 8 MB" in line
        assert mounted(disk, "80m", "remount")
        done = run(*flags)
        assert done.returncode == 0 and "going on from" in done.stdout and same(whole, disk / "run")
        note("a full disk while saving", 1, 1, 0)
    finally:
        subprocess.run(["umount", str(disk)], capture_output=True)


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
        bucket = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "sweepName": "", "project": project}
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


@pytest.mark.parametrize("mode", ["refuse", "hang", "drop"])
def test_a_wandb_server_that_fails(tmp_path, mode):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.mode, server.seen, server.begun, server.daemon_threads = mode, 0, False, True
    url = f"http://127.0.0.1:{server.server_address[1]}"
    if mode == "refuse":
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": "0123456789" * 4}
    out = tmp_path / "run"
    done = run(*SMALL, "--max_steps", 4, "--save_strategy", "no", "--output_dir", out, env=env)
    if mode != "refuse":
        server.shutdown()
        assert server.seen > 0
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert "upload the run:     wandb sync" in done.stdout
    assert steps_in_wandb(out) == [1, 2, 3, 4]
    note(
        {"refuse": "a W&B server that refuses", "hang": "that never answers", "drop": "that drops the run"}[mode],
        1,
        1,
        0,
    )


def test_no_secret_is_written(tmp_path):
    secrets = {"WANDB_API_KEY": "5ecre7" * 6 + "abcd", "HF_TOKEN": "hf_" + "S3cr3tT0k3n" * 3}
    out = tmp_path / "run"
    done = run(*SMALL, "--max_steps", 2, "--save_steps", 1, "--output_dir", out, env=secrets)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [f for f in out.rglob("*") if f.is_file() and any(s.encode() in f.read_bytes() for s in secrets.values())]
    note("bytes of two planted secrets searched for in all files", "all", "", f"{len(found)} found")
    assert found == [] and not any(s in done.stdout + done.stderr for s in secrets.values())


def test_silent_failures_speak(tmp_path):
    flags = (
        *SMALL,
        "--max_completion_length",
        6,
        "--save_strategy",
        "no",
        "--max_steps",
        52,
        "--output_dir",
        tmp_path / "a",
    )
    done = run(*flags, "--reward_weights", 0, 0, 0, 0, 0)
    assert done.returncode == 0, done.stderr[-2000:]
    for text in ("any reward variance for 20 steps", "most completions are cut off", "format rewards are still 0"):
        assert done.stderr.count(text) == 1, text


@pytest.mark.parametrize("rate", ["1e30", "1e38"])  # weights that overflow, and weights that are not finite at once
def test_what_is_not_finite_stops_the_run_unsaved(tmp_path, rate):
    out = tmp_path / "run"
    wild = ("--learning_rate", rate, "--max_grad_norm", 0, "--warmup_steps", 4, "--save_steps", 1, "--max_steps", 9)
    done = run(*SMALL, *wild, "--output_dir", out)
    assert done.returncode == 1 and done.stderr.count("is not finite: stopping") == 1, done.stderr[-2000:]
    assert "start anew: lower --learning_rate, --overwrite_output" in done.stdout
    assert not (out / "model.safetensors").exists()
    assert [f.name for f in out.glob("checkpoint-*")] == ["checkpoint-1"]  # the first step has learning rate 0
    kept = load_file(out / "checkpoint-1" / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())


TWO = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")


def test_a_process_that_dies_takes_the_run_down_and_it_resumes(tmp_path):
    out = tmp_path / "run"
    flags = (*SMALL, "--per_device_train_batch_size", 8, "--max_steps", 12, "--save_steps", 2, "--output_dir", out)
    process = start(*flags, launcher=TWO)
    while not (out / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {p: Path(f"/proc/{p}/environ").read_bytes() for p in children}
    (victim,) = [p for p, environ in ranks.items() if b"\0RANK=1\0" in b"\0" + environ]
    os.kill(int(victim), signal.SIGKILL)
    killed = time.time()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - killed < 60
    done = run(*flags, launcher=TWO)
    assert done.returncode == 0 and done.stdout.count("going on from") == 1, done.stderr[-2000:]
    assert (out / "model.safetensors").exists() and steps_in_wandb(out) == list(range(1, 13))
    note("one of two processes killed", 1, 1, 0)


# --- hostile model output

TAGS = [
    "<reasoning>",
    "</reasoning>",
    "<answer>",
    "</answer>",
    "\n",
    " ",
    "=",
    "+",
    "1",
    "1,",
    ".",
    "/",
    "$",
    "-",
    "x",
    "\ud800",
]
HOSTILE = st.one_of(
    st.text(), st.lists(st.sampled_from(TAGS), max_size=60).map("".join), st.binary().map(lambda b: b.decode("latin1"))
)


def everything(text: str, gold: str = "18") -> None:
    completions = [[{"role": "assistant", "content": text}]]
    for function in REWARD_FUNCS:
        kept = {}
        (value,) = function(
            completions=completions, answer=[gold], log_metric=kept.__setitem__, log_extra=lambda *_: None
        )
        assert isinstance(value, float) and abs(value) < 1e6
        assert all(abs(v) < 1e9 for v in kept.values())
    assert len(rewards.score(text, gold)) == 4


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(HOSTILE)
def never_raises(text):
    everything(text)


def test_rewards_never_raise():
    never_raises()  # ends at the first exception
    rng = random.Random(0)
    for _ in range(45_000):  # hypothesis looks for corners, at a hundred times the cost
        everything("".join(rng.choices(TAGS, k=rng.randrange(60))))
        everything("".join(map(chr, rng.choices(range(0x3000), k=rng.randrange(40)))))
    note("hostile completions given to all rewards and measures", "100,000", "100,000", "0 exceptions")


@pytest.mark.parametrize("size", [1_000, 10_000, 100_000])
def test_hostile_texts_take_linear_time(size):
    units = [
        *TAGS,
        "1+",
        "1+1=",
        "1,000,",
        "<reasoning>\n</reasoning>\n<answer>\n",
        "</reasoning> <answer>",
        "9 x ",
        "1 a + ",
        "\n</answer>\n",
    ]
    slowest = 0.0
    for unit in units:
        for prefix in ("", "<reasoning>", "<reasoning>\n", "<reasoning>\na\n</reasoning>\n<answer>\n"):
            text = (prefix + unit * (size // len(unit) + 1))[:size]
            begin = time.perf_counter()
            everything(text)
            slowest = max(slowest, time.perf_counter() - begin)
    print(f"{size:,} characters: {slowest:.3f} s for all rewards and measures of the slowest text")
    assert slowest < 1.0
