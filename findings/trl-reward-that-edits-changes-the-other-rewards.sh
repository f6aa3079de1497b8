#!/usr/bin/env bash
# A reward function that cleans completions in place changes what the next rewards judge.
#
# Versions: trl 1.16.0, transformers 5.17.0, torch 2.13.0.
# What happens: GRPOTrainer hands the SAME completion messages to each reward function and then to
#   the completions table. A reward that shortens or strips completion[0]["content"] before it
#   judges changes the text for the functions after it in reward_funcs, not for those before: the
#   order of the list changes the rewards. The logged completions show the edited text, as if the
#   model had written it; what is trained (the tokens) is the unedited one. No warning.
# A good guess: each reward function judges what the model wrote, so their order does not matter.
# What to do: work on a copy in reward functions, and compare the rewards in another order once.
# Control: the same function on a deep copy. There the good guess holds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile 'torch==2.13.0' 'transformers==5.17.0' 'trl==1.16.0' \
    'datasets==5.2.0' 'accelerate==1.15.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1
venv/bin/python - 2>errors.txt <<'PYTHON' || { tail -n 5 errors.txt; exit 1; }
from copy import deepcopy
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

print(*(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")), sep=", ")
WORDS = ["<pad>", "<eos>"] + [f"w{i}" for i in range(30)]
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def make_trainer(reward, folder="out", **settings):
    """Return a GRPOTrainer of a tiny random model: 4 completions of one prompt a step."""
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, pad_token_id=0, eos_token_id=1, **SIZES)
    common = dict(
        per_device_train_batch_size=4, num_generations=4, max_completion_length=6, seed=1,
        bf16=False, use_cpu=True, logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    args = GRPOConfig(folder, **(common | settings))
    prompts = [[{"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(8)]
    data = Dataset.from_dict({"prompt": prompts})
    model = LlamaForCausalLM(config)
    trainer = GRPOTrainer(model, reward, args, data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def cut(completions, **kwargs):
    """Keep the first word, then judge (here: always 0)."""
    for completion in completions:
        completion[0]["content"] = completion[0]["content"].split(" ")[0]
    return [0.0] * len(completions)


def cut_a_copy(completions, **kwargs):
    return cut(deepcopy(completions))


def train(*rewards):
    """Return the mean of the length reward, and the completions for the table."""
    trainer = make_trainer(list(rewards), max_steps=1, save_strategy="no")
    trainer.train()
    mean = trainer.state.log_history[0]["rewards/length/mean"]
    table = [completion[0]["content"] for completion in trainer._logs["completion"]]
    print(f"{[r.__name__ for r in rewards]}: mean length {mean}, first in the table: {table[0]!r}")
    return mean, table


written, table_before = train(length, cut)
edited, table_after = train(cut, length)
assert edited < written, "behaviour has changed"
assert table_before == table_after and " " not in "".join(table_after), "behaviour has changed"

copies = [train(length, cut_a_copy), train(cut_a_copy, length)]
assert copies[0] == copies[1] and copies[0][0] == written, "the control fails"
assert any(" " in text for text in copies[0][1]), "the control fails: the table is edited"
PYTHON
