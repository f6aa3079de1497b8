#!/usr/bin/env bash
# GRPOTrainer accepts data_seed and ignores it: the order of prompts follows seed.
#
# Versions: trl 1.16.0, transformers 5.17.0, torch 2.13.0.
# What happens: data_seed is a setting of transformers' TrainingArguments ("random seed to be used
#   with data samplers"), so GRPOConfig takes it. GRPOTrainer has a sampler of its own, which is
#   seeded with seed. Runs that differ only in data_seed are the same run, completions included, so
#   several orders of the data are only one. No warning.
# A good guess: data_seed sets the order, as in transformers' Trainer, and seed all else.
# What to do: dataset.shuffle(seed=...) and shuffle_dataset=False.
# Control: transformers' Trainer on as many rows follows data_seed, and GRPOTrainer follows seed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile 'torch==2.13.0' 'transformers==5.17.0' 'trl==1.16.0' \
    'datasets==5.2.0' 'accelerate==1.15.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1
venv/bin/python - 2>errors.txt <<'PYTHON' || { tail -n 5 errors.txt; exit 1; }
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

print(*(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")), sep=", ")
WORDS = ["<pad>", "<eos>"] + [f"w{i}" for i in range(30)]
PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]})
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def make_trainer(reward, folder="out", **settings):
    """Return a GRPOTrainer of a tiny random model: 4 completions of one prompt a step."""
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, pad_token_id=0, eos_token_id=1, **SIZES)
    common = dict(
        per_device_train_batch_size=4, num_generations=4, max_completion_length=6, bf16=False,
        use_cpu=True, logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    args = GRPOConfig(folder, **(common | settings))
    model = LlamaForCausalLM(config)
    trainer = GRPOTrainer(model, reward, args, PROMPTS, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def grpo_run(**seeds):
    """Return the prompt and the completions of each step."""
    steps = []

    def reward(prompts, completions, **kwargs):
        steps.append((prompts[0], completions))
        return [float(len(text.split()) % 3) for text in completions]

    make_trainer(reward, max_steps=8, save_strategy="no", **seeds).train()
    return steps


def trainer_order(**seeds):
    """Return the order in which transformers' Trainer takes eight rows."""
    order = []

    def collate(rows):
        order.extend(row["input_ids"][0] for row in rows)
        return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}

    args = TrainingArguments(
        "out", per_device_train_batch_size=1, max_steps=8, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True, **seeds,
    )  # fmt: skip
    rows = [{"input_ids": [i, 9], "labels": [i, 9]} for i in range(8)]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SIZES))
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return order


SEEDS = (1, 1), (1, 2), (2, 1)
first, other, reseeded = [grpo_run(seed=seed, data_seed=data) for seed, data in SEEDS]
for (seed, data), run in zip(SEEDS, (first, other, reseeded), strict=True):
    print(f"GRPOTrainer, seed {seed}, data_seed {data}: {[prompt for prompt, _ in run]}")
assert first == other, "behaviour has changed: data_seed changes the run"
assert [p for p, _ in first] != [p for p, _ in reseeded], "the control with seed fails"

orders = [trainer_order(seed=seed, data_seed=data) for seed, data in SEEDS]
for (seed, data), order in zip(SEEDS, orders, strict=True):
    print(f"Trainer, seed {seed}, data_seed {data}: {order}")
assert orders[0] == orders[2] != orders[1], "the control with transformers' Trainer fails"
PYTHON
