#!/usr/bin/env bash
# The second Trainer in a Python process logs into the first one's W&B run and replaces its settings.
#
# Versions: transformers 5.17.0 (Trainer, and so TRL 1.16.0), wandb 0.31.0, accelerate 1.15.0,
#   torch 2.13.0. W&B offline.
# What happens: transformers' WandbCallback starts a run only if none is open, and closes none at the end
#   of training. A second Trainer (a sweep in a loop, a notebook cell run again) finds the first run open.
#   Its run_name is ignored, its rows follow the first one's, its settings overwrite the config.
# Seen: trainers "first" (learning rate 0.001) and "second" (0.002), both to the end: one run named
#   "first", with the 4 rows of each (3 steps and the end) and learning_rate 0.002. No warning.
# A good guess: two runs named "first" and "second", each with its own losses and settings.
# Control: with wandb.finish() between the two trainers there are two runs with two names.
# What to do: call wandb.finish() after each train(), also when it raised an error (try ... finally).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  'torch==2.13.0' 'transformers==5.17.0' 'accelerate==1.15.0' 'wandb==0.31.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" OMP_NUM_THREADS=2
export WANDB_MODE=offline WANDB_SILENT=true
cat >train.py <<'EOF'
import sys

import transformers
import wandb
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()


def train(name, learning_rate):
    """Train a tiny model for 3 steps; describe the W&B run that is open afterwards."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    ))
    args = TrainingArguments(
        output_dir="out", run_name=name, learning_rate=learning_rate, max_steps=3, logging_steps=1,
        save_strategy="no", report_to=["wandb"], disable_tqdm=True, use_cpu=True,
    )
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 32
    trainer = Trainer(model, args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    run = wandb.run
    return f"name {run.name}, learning_rate {run.config['learning_rate']}, {run.step} rows"


after_first = train("first", 0.001)
if sys.argv[1] == "finish":
    wandb.finish()
after_second = train("second", 0.002)
wandb.finish()
print(f"after the first trainer: {after_first}; after the second: {after_second}")
EOF
declare -A lines runs
for between in nothing finish; do
  mkdir $between
  (cd $between && ../venv/bin/python ../train.py $between >out.txt 2>log || { cat log >&2; exit 1; })
  lines[$between]=$(tail -n 1 $between/out.txt)
  runs[$between]=$(find $between/wandb -name '*.wandb' | wc -l)
done
venv/bin/pip list --disable-pip-version-check | grep -E '^(transformers|wandb) '
echo "nothing between:        ${lines[nothing]}; W&B runs on disk: ${runs[nothing]}"
echo "wandb.finish() between: ${lines[finish]}; W&B runs on disk: ${runs[finish]}"
fail() { echo "$1" >&2; exit 1; }
first="after the first trainer: name first, learning_rate 0.001, 4 rows"
[[ ${lines[finish]} == "$first; after the second: name second, learning_rate 0.002, 4 rows" ]] &&
  [ "${runs[finish]}" = 2 ] || fail "control: two runs were expected"
[[ ${lines[nothing]} == "$first; after the second: name first, learning_rate 0.002, 8 rows" ]] &&
  [ "${runs[nothing]}" = 1 ] || fail "changed: the trainers no longer share one run"
echo "As described: without wandb.finish() both trainers share one run."
