#!/usr/bin/env bash
# A GRPO run resumed in its second epoch takes the prompts in the FIRST epoch's order.
#
# Versions: TRL 1.16.0, transformers 5.17.0, torch 2.13.0.
# What happens: TRL's RepeatSampler seeds its generator once and draws a new order each epoch. A resumed
#   run starts a new generator, so its first order is epoch 1's, in whatever epoch it resumes.
#   transformers skips the batches done so far, but in that wrong order. No warning.
# Seen: 8 prompts, 2 a step, stopped at step 6 (the middle of epoch 2). The unbroken run trains w3 w2 w0 w5
#   in steps 7 and 8, the resumed run w2 w1 w4 w5. So within epoch 2 w1 and w4 are trained twice,
#   w0 and w3 never.
# A good guess: the same prompts as without the stop, as transformers' own Trainer does.
# Control 1: a stop within epoch 1 continues with the same prompts. Control 2: transformers' Trainer,
#   resumed in its second epoch on the same rows, continues with the same rows.
# What to do: override _get_train_sampler so that a run that resumes after k whole epochs calls
#   list(sampler) k times before it returns the sampler. This gives the unbroken order (tried).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  'torch==2.13.0' 'transformers==5.17.0' 'accelerate==1.15.0' 'datasets==5.2.0' 'trl==1.16.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" OMP_NUM_THREADS=2
venv/bin/python - <<'EOF'
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, Trainer,
    TrainingArguments, set_seed,
)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
words = ["<pad>", "</s>"] + [f"w{i}" for i in range(30)]
core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
settings = dict(
    num_train_epochs=2, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
)


def tiny_model():
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    ))


def grpo_prompts(resume=None):
    """Return the prompts of each step, in the order in which GRPO trains them."""
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append(prompts[::2])
        return [float(len(text)) for text in completions]

    args = trl.GRPOConfig(
        output_dir="grpo", per_device_train_batch_size=4, num_generations=2,
        max_completion_length=4, **settings,
    )
    data = Dataset.from_dict({"prompt": words[2:10]})
    trainer = trl.GRPOTrainer(tiny_model(), reward, args, data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return seen


def trainer_rows(resume=None):
    """Return the rows of each step, in the order in which transformers' Trainer trains them."""
    seen = []

    class Watched(Trainer):
        def training_step(self, model, inputs, *rest):
            seen.append([words[row[0]] for row in inputs["input_ids"].tolist()])
            return super().training_step(model, inputs, *rest)

    data = [{"input_ids": [i, 1], "labels": [i, 1]} for i in range(2, 10)]
    args = TrainingArguments(output_dir="plain", per_device_train_batch_size=2, **settings)
    trainer = Watched(tiny_model(), args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return seen


print(f"TRL {trl.__version__}, transformers {transformers.__version__}")
same = {}
for name, order in (("grpo", grpo_prompts), ("plain", trainer_rows)):
    unbroken = order()
    print(f"{name:5} unbroken:        ", *(" ".join(step) for step in unbroken), sep=" | ")
    for stop in (2, 6) if name == "grpo" else (6,):
        resumed = order(resume=f"{name}/checkpoint-{stop}")
        same[name, stop] = resumed == unbroken[stop:]
        print(f"{name:5} resumed at step {stop}", *["     "] * stop,
              *(" ".join(step) for step in resumed), sep=" | ")
        if (name, stop) == ("grpo", 6):
            assert resumed == unbroken[2:4], "changed: these are not epoch 1's last steps"
assert same["plain", 6], "control: Trainer should keep the order"
assert same["grpo", 2], "control: within epoch 1 the same prompts were expected"
assert not same["grpo", 6], "changed: a resume in epoch 2 now keeps the order"
print("As described: GRPO resumed in epoch 2 takes epoch 1's order; transformers' Trainer does not.")
EOF
