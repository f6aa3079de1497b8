"""The simulated memory: next to the resident memory of a real step, and its order of sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2Config

import grpo_demo
from assets import memory
from grpo_demo import parse_args

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 32768}
FLAGS = "--use_cpu True --dtype float32 --bf16 False --num_generations 8 --max_prompt_length 64"
FLAGS += " --max_completion_length 192 --gradient_accumulation_steps 8 --evaluate False"
ROWS = 4
REAL = """
import json, sys
from pathlib import Path
from transformers import Qwen2Config
from assets import memory
from grpo_demo import parse_args

def resident(key):
    return 1024 * int(Path("/proc/self/status").read_text().split(key)[1].split()[0])

def peaks(step, rows):
    for name, *sizes in (("prefill", 8), ("decode", 8), ("loss", rows), ("update",)):
        if name == "loss":
            step.fill_gradients()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        getattr(step, name)(*sizes)
        yield resident("VmHWM:")

shape, flags, rows = json.loads(sys.argv[1])
settings = parse_args(flags.split())
tiny = shape | {"num_hidden_layers": 1, "vocab_size": 512}
list(peaks(memory.Step(Qwen2Config(**tiny), *settings), 1))  # what the libraries keep
empty = resident("VmRSS:")
step = memory.Step(Qwen2Config(**shape), *settings)
print(json.dumps([peak - empty for peak in peaks(step, rows)]))
"""


def simulate(flags: str = FLAGS) -> list[int]:
    """Return the simulated peaks of prefill, decode, loss and update, in bytes."""
    with FakeTensorMode(), memory.Memory() as counter:
        step = memory.Step(Qwen2Config(**SHAPE), *parse_args(flags.split()))
        generation = [counter.of(step.prefill, 8), counter.of(step.decode, 8)]
        step.fill_gradients()
        return [*generation, counter.of(step.loss, ROWS), counter.of(step.update)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_resident_memory_of_a_real_step_is_near_the_simulated():
    """Within 10% in each phase, on the CPU, in float32; freed memory goes back to the system."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    argv = [sys.executable, "-W", "ignore", "-c", REAL, json.dumps([SHAPE, FLAGS, ROWS])]
    real = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(real.stdout.splitlines()[-1])
    assert simulate() == pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def tables() -> dict[str, dict]:
    """Return for full and LoRA: checkpointing and micro-batch -> peaks, as on CUDA."""
    result = {}
    for name, flags in {"full": FLAGS, "lora": f"{FLAGS} --use_peft"}.items():
        rows = memory.peaks(Qwen2Config(**SHAPE), *parse_args(flags.split()))
        result[name] = {(checkpointing, n): peak for checkpointing, n, peak in rows}
    return result


@pytest.mark.parametrize("training", ["full", "lora"])
def test_a_larger_micro_batch_takes_more_and_checkpointing_less(tables, training):
    loss = {key: peak["loss"] for key, peak in tables[training].items()}
    batches = sorted({n for _, n in loss})
    assert batches == [1, 2, 4, 8]
    for checkpointing in (False, True):
        sizes = [loss[checkpointing, n] for n in batches]
        assert sizes == sorted(set(sizes))
    assert all(loss[True, n] < loss[False, n] for n in batches)


def test_lora_takes_less_in_every_phase(tables):
    for key, peak in tables["full"].items():
        assert all(tables["lora"][key][phase] < peak[phase] for phase in peak)


def test_the_adapter_has_the_dtype_that_peft_gives_it():
    settings = parse_args(f"{FLAGS} --use_peft --dtype bfloat16 --bf16 True".split())
    tiny = Qwen2Config(**SHAPE | {"num_hidden_layers": 1, "vocab_size": 512})
    real = [(p.shape, p.dtype) for p in memory.Step(tiny, *settings).trained]
    with FakeTensorMode():
        assert real == [(p.shape, p.dtype) for p in memory.Step(tiny, *settings).trained]
    assert len(real) == 14  # A and B of seven projections


def test_weights_gradients_and_adam_are_what_arithmetic_says(tables):
    """An update holds weights, reference, gradients, two Adam states and one temporary: six."""
    parameters = 32768 * 512 * 2  # embedding and head, which this shape does not tie
    parameters += 4 * (2 * 512 * 513 + 2 * 128 * 513 - 512 + 3 * 512 * 1536 + 2 * 512) + 512
    assert tables["full"][False, 1]["optimizer"] == pytest.approx(6 * 4 * parameters, rel=0.001)


def test_the_report_names_the_largest_micro_batch_of_each_card(monkeypatch, capsys):
    def peaks(config, args, model_args):
        for checkpointing, each in ((False, 20e9), (True, 10e9)):  # bytes for each completion
            for rows in (1, 2, 4):
                yield checkpointing, rows, {"generation": 15e9, "loss": each * rows}

    monkeypatch.setattr(memory, "peaks", peaks)
    grpo_demo.main(["--estimate_memory", "--use_peft", "--gradient_checkpointing"])
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    (own,) = [line for line in lines if "<-" in line]
    assert own[:5] == ["LoRA", "on", "1", "15.0", "generation"]
    largest = [line[-4:] for line in lines if line[1:2] == ["checkpointing"] and len(line) == 7]
    assert largest == 2 * [["none", "1", "2", "2"], ["none", "2", "4", "4"]]


def test_an_unknown_model_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        grpo_demo.main(["--estimate_memory", "--model_name_or_path", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
