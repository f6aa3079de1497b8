#!/usr/bin/env bash
# Tags added as special tokens never reach GRPO's reward functions.
#
# Versions: trl 1.16.0, transformers 5.17.0, torch 2.13.0.
# What happens: GRPOTrainer decodes completions with skip_special_tokens=True before it calls the
#   rewards. If tags such as <answer> or <think> are special tokens of the tokenizer, the model
#   writes them and learns from their log-probabilities, but every reward sees text without them. A
#   format reward is 0 for perfect completions, so the format is never learned. The logged
#   completions show no tags either, as if the model did not write them. No warning.
# A good guess: only padding and the end of the text are taken away; rewards see what was written.
# What to do: tokenizer.add_tokens(tags), without special_tokens=True; or decode completion_ids,
#   which every reward function gets, yourself.
# Control: the same tags added as ordinary tokens. There the good guess holds.
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

print(*(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")), sep=", ")
WORDS = ["<pad>", "<eos>"] + ["<answer>", "</answer>"] + [f"w{i}" for i in range(28)]
PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]})
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def make_trainer(reward, special_tags, folder="out", **settings):
    """Return a GRPOTrainer of a tiny random model: 4 completions of one prompt a step."""
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.add_tokens(["<answer>", "</answer>"], special_tokens=special_tags)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, pad_token_id=0, eos_token_id=1, **SIZES)
    common = dict(
        per_device_train_batch_size=4, num_generations=4, max_completion_length=64, seed=1,
        bf16=False, use_cpu=True, logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    args = GRPOConfig(folder, **(common | settings))
    model = LlamaForCausalLM(config)
    trainer = GRPOTrainer(model, reward, args, PROMPTS, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def tags_seen(special_tags):
    """Return how many <answer> tags were written, how many the reward saw, and the mean reward."""
    counts = []

    def reward(completions, completion_ids, **kwargs):
        written = sum(ids.count(WORDS.index("<answer>")) for ids in completion_ids)
        counts.append((written, sum(text.count("<answer>") for text in completions)))
        return [float("<answer>" in text) for text in completions]

    longest = {"min_new_tokens": 64}  # nearly uniform tokens: about eight tags in four completions
    trainer = make_trainer(reward, special_tags, max_steps=1, generation_kwargs=longest)
    trainer.train()
    (written, read), logged = counts[0], trainer.state.log_history[0]["reward"]
    print(f"special={special_tags}: {written} written, {read} reach the reward, which is {logged}")
    return written, read, logged


written, read, reward = tags_seen(special_tags=True)
assert written > 0 and (read, reward) == (0, 0.0), "behaviour has changed"
written, read, reward = tags_seen(special_tags=False)
assert written == read > 0 and reward > 0, "the control fails"
PYTHON
