#!/usr/bin/env bash
# Evaluating while training changes every training completion that follows.
#
# Versions: trl 1.16.0, transformers 5.17.0, torch 2.13.0.
# What happens: GRPOTrainer's evaluation samples completions, and draws them from the same random
#   stream as training. With eval_strategy="steps" every training completion after the first
#   evaluation differs from those of the run without evaluation: another run from there on. So two
#   runs that differ only in eval_steps, or in the number of evaluation rows, differ in their
#   result.
# A good guess: evaluation only measures. With the same seed the training is the same, as it is for
#   supervised training, where evaluation draws no random numbers.
# What to do: keep the evaluation settings equal in runs that you compare, or put the random state
#   back after each evaluation (on a GPU that device's too), as the control does.
# Control: the same run twice without evaluation, and one whose evaluate() puts the random state
#   back. In both the good guess holds.
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
WORDS = ["<pad>", "<eos>"] + [f"w{i}" for i in range(30)]
PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]})
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
SIZES["initializer_range"] = 0.5  # far from uniform, so that the completions differ


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
        per_device_train_batch_size=4, num_generations=4, max_completion_length=6, seed=1,
        bf16=False, use_cpu=True, logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    args = GRPOConfig(folder, **(common | settings))
    trainer = GRPOTrainer(
        LlamaForCausalLM(config), reward, args, PROMPTS, PROMPTS.select([0]), tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(careful=False, **settings):
    """Return the completions that each of 6 steps is trained on."""
    trained_on = []

    def reward(completions, **kwargs):
        if trainer.model.training:
            trained_on.append(completions)
        return [float(len(text.split()) % 3) for text in completions]

    trainer = make_trainer(reward, max_steps=6, save_strategy="no", **settings)
    if careful:
        trainer.evaluate = torch.random.fork_rng()(trainer.evaluate)
    trainer.train()
    assert len(trained_on) == 6
    return trained_on


plain = train()
every = dict(eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=4)
runs = {
    "evaluation after step 3": train(**every),
    "no evaluation, once more": train(),
    "evaluation, random state put back": train(careful=True, **every),
}
same = {name: [a == b for a, b in zip(plain, run, strict=True)] for name, run in runs.items()}
for name, steps in same.items():
    equal = [i + 1 for i in range(6) if steps[i]]
    print(f"{name}: steps with the completions of the plain run: {equal}")
changed, again, careful = same.values()
assert changed == [True] * 3 + [False] * 3, "behaviour has changed"
assert all(again) and all(careful), "the control fails"
PYTHON
