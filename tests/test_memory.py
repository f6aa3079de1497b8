"""The simulated memory: next to the resident memory of a real step, and its order of sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, Qwen2Config

from assets.tools import memory
from grpo_demo import parse_args

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 32768}
SMALL = {"num_hidden_layers": 2, "vocab_size": 600, "head_dim": 64, "pad_token_id": 0}
FLAGS = "--use_cpu True --dtype float32 --bf16 False --num_generations 8 --max_prompt_length 64"
FLAGS += " --max_completion_length 96 --gradient_accumulation_steps 8 --evaluate False"
PHASES = {"generate": [8], "loss": [4], "update": []}
REAL = """
from tests.test_memory import *
resident = lambda key: 1024 * int(Path("/proc/self/status").read_text().split(key)[1].split()[0])
def peaks(step):
    step.fill_gradients()
    for name, sizes in PHASES.items():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        getattr(step, name)(*sizes)
        yield resident("VmHWM:")
build = lambda shape: memory.Step(Qwen2Config(**shape), *parse_args(FLAGS.split()))
list(peaks(build(SHAPE | SMALL)))  # what the libraries keep
empty = resident("VmRSS:")
print(json.dumps([peak - empty for peak in peaks(build(SHAPE))]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_resident_memory_of_a_real_step_is_near_the_simulated():
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env = os.environ | env | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    real = subprocess.check_output([sys.executable, "-c", REAL], env=env, text=True)
    with FakeTensorMode(), memory.Memory() as counter:
        step = memory.Step(Qwen2Config(**SHAPE), *parse_args(FLAGS.split()))
        step.fill_gradients()
        simulated = [counter.of(getattr(step, name), *sizes) for name, sizes in PHASES.items()]
    assert simulated == pytest.approx(json.loads(real.splitlines()[-1]), rel=0.1)


def test_less_for_small_micro_batches_for_checkpointing_and_for_lora():
    """An update holds weights, reference, gradients, two Adam states, a temporary: six."""
    settings = (parse_args([*FLAGS.split(), *more]) for more in ([], ["--use_peft"]))
    found = (memory.peaks(Qwen2Config(**SHAPE), *both, sizes=[1, 4]) for both in settings)
    full, lora = ({(on, rows): peak for on, rows, peak in peaks} for peaks in found)
    assert [*full] == [(on, rows) for on in (False, True) for rows in (1, 4)]
    for (on, rows), peak in full.items():
        assert all(lora[on, rows][phase] < peak[phase] for phase in peak)
        assert rows == 1 or full[on, 1]["loss"] < peak["loss"]
        assert not on or peak["loss"] < full[False, rows]["loss"]
    layer = 2 * 512 * 513 + 2 * 128 * 513 - 512 + 3 * 512 * 1536 + 2 * 512
    update = 6 * 4 * (2 * 32768 * 512 + 4 * layer + 512)
    assert full[False, 1]["optimizer"] == pytest.approx(update, rel=0.001)
    with FakeTensorMode():
        step = memory.Step(Qwen2Config(**SHAPE), *parse_args(["--use_cpu", "True", "--use_peft"]))
    assert {p.dtype for p in step.trained} == {torch.float32}  # beside a model in bf16


@pytest.mark.parametrize("family", ["gemma2", "mistral", "lfm2"])
def test_a_cache_with_a_window_or_a_fixed_state_takes_less(family):
    settings, found = parse_args([*FLAGS.split(), "--max_completion_length", "2000"]), []
    kind = "conv" if family == "lfm2" else "sliding_attention"
    for layer, window in ((kind, 16), ("full_attention", 10_000)):
        kinds = {} if family == "mistral" else {"layer_types": [layer, "full_attention"]}
        config = CONFIG_MAPPING[family](**SHAPE | SMALL | kinds | {"sliding_window": window})
        found += [peak["generation"] for *_, peak in memory.peaks(config, *settings, [False], [1])]
    assert found[0] < found[1] - 8 * 1900 * 2 * 64 * 4  # keys of 8 rows, 2 heads, in float32


def test_what_cannot_be_estimated_is_one_line(capsys, tmp_path):
    CONFIG_MAPPING["gpt_neox"](**SHAPE | SMALL).save_pretrained(tmp_path / "neox")
    flags = [*FLAGS.split(), "--model_name_or_path"]
    memory.main([*flags, str(tmp_path / "neox")])  # it has none of the layers that LoRA names
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["LoRA"]] == ["not"]
    assert [line[3:] for line in lines if line[:1] == ["full,"]] == [["8"] * 4] * 2
    with pytest.raises(SystemExit) as end:
        memory.main([*flags, str(tmp_path)])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
