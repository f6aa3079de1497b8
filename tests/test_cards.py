"""The settings for each card: the default recipe, and a tenth of the card free by estimate."""

import re
from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT
from transformers import Qwen2Config

from assets import memory
from grpo_demo import parse_args

FILES = sorted((ROOT / "assets/cards").glob("*.yaml"))
HERE = ["--use_cpu", "True", "--use_vllm", "False"]  # the tests have no GPU and no vLLM
MEMORY = {"use_peft", "dtype", "bf16", "fp16", "gradient_checkpointing"}
MEMORY |= {"per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"}
MEMORY |= {"per_device_eval_batch_size", "use_vllm", "vllm_gpu_memory_utilization"}


def settings(*flags: str) -> dict:
    """Return all settings of a command line, by name."""
    args, model_args = parse_args([*flags, *HERE])
    return asdict(args) | asdict(model_args)


def test_every_card_has_its_file():
    assert {path.name for path in FILES} == {f"{card}gb.yaml" for card in memory.CARDS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_card_changes_only_what_memory_needs(path):
    card, default = settings("--config", str(path)), settings()
    changed = {name for name in default if card[name] != default[name]}
    changed |= yaml.safe_load(path.read_text()).keys()
    assert changed <= MEMORY | ({"learning_rate"} if card["use_peft"] else set())
    assert card["per_device_train_batch_size"] * card["gradient_accumulation_steps"] == 64
    assert (card["generation_batch_size"], card["num_generations"]) == (64, 16)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tenth_of_the_card_is_free(path):
    """vLLM gets its share of the card; the file and the notes state the estimate."""
    text, size = path.read_text(), int(path.stem.removesuffix("gb"))
    args, model_args = parse_args(["--config", str(path), *HERE])
    own = [args.gradient_checkpointing], [args.per_device_train_batch_size]
    ((_, _, peak),) = memory.peaks(Qwen2Config(**memory.QWEN), args, model_args, *own)
    vllm = yaml.safe_load(text).get("use_vllm", False)
    top = max(peak.values()) / 1e9 + vllm * args.vllm_gpu_memory_utilization * size
    assert top <= memory.USABLE * size
    assert re.search(r"Estimated peak: ([\d.]+) GB", text)[1] == f"{top:.1f}"
    notes = (ROOT / "assets/notes/gpu.md").read_text()
    (row,) = [line for line in notes.splitlines() if line.startswith(f"| [`{path.name}`]")]
    assert row.endswith(f"| {top:.1f} | {1 - top / size:.0%} |")
