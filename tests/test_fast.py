"""A faster setting computes the same: completions between generation backends, and tests/benchmark.py itself.

That the micro-batch changes nothing is in test_step.py.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import grpo_demo

GREEDY = ["--config", "assets/tiny/config.yaml", "--report_to", "none", "--generation_kwargs", '{"do_sample": false}']
SMALL_CACHE = json.dumps({"max_memory_percent": 0.05})
BACKENDS = {
    "four calls": ["--per_device_train_batch_size=16", "--gradient_accumulation_steps=4"],
    "continuous batching": [
        "--use_transformers_continuous_batching=True",
        f"--transformers_continuous_batching_config={SMALL_CACHE}",
    ],
}


def completions(out, size: int, *flags: str) -> list[list[int]]:
    """What the trainer generates for the first 64 questions, `size` at a time."""
    args, model_args = grpo_demo.parse_args([*GREEDY, *flags, "--output_dir", str(out)])
    rows = grpo_demo.get_gsm8k_questions("train", args.dataset_name)
    trainer = grpo_demo.build_trainer(args, model_args, rows)
    prompts = trainer.processing_class.apply_chat_template(rows["prompt"][:64], add_generation_prompt=True)["input_ids"]
    parts = [trainer._generate_single_turn(prompts[i : i + size], None, {}, 1)[0] for i in range(0, 64, size)]
    return [row for part in parts for row in part]


@pytest.fixture(scope="module")
def one_call(tmp_path_factory):
    return completions(tmp_path_factory.mktemp("one_call"), 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_backend_generates_the_same(tmp_path, one_call, backend):
    assert len({tuple(row) for row in one_call}) > 60 and max(map(len, one_call)) > 30
    assert completions(tmp_path, 16 if backend == "four calls" else 64, *BACKENDS[backend]) == one_call


def test_the_gpu_benchmark_runs_at_a_tiny_shape():
    command = [sys.executable, "tests/benchmark.py", "--gpu", "--shape", "tiny"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"][2:]
        for part in done.stdout.split("### ")[1:]
    ]
    assert [len(table) for table in tables] == [6, 6, 3], done.stdout
    backends, steps, ways = tables
    assert {row[-1] for row in backends} == {"100.0%"} and all(float(row[2]) > 0 for row in backends)
    for lengths in {row[3] for row in steps}:  # the same gradient whatever the micro-batch
        assert len({row[-1] for row in steps if row[3] == lengths and "LoRA" not in row[0]}) == 1
    assert all(float(row[1]) > 0 for row in ways) and ways[0][-1] == "1.00"
