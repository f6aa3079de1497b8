#!/usr/bin/env bash
# save_total_limit deletes a copy that you kept as "checkpoint-3-best".
#
# Versions: transformers 5.17.0 (Trainer, and so TRL 1.16.0), accelerate 1.15.0, torch 2.13.0.
# What happens: rotation counts every folder whose name begins with "checkpoint-" and a number, whatever
#   follows, and deletes the ones with the lowest numbers. Resuming looks for exact names.
# Seen: checkpoint-3 is copied to checkpoint-3-best, then the run is resumed with save_total_limit=2. The
#   copy is gone after the next save but one, without a message. It also takes one of the two places.
# A good guess: only what Trainer has saved itself, checkpoint-N, is counted and deleted, as
#   get_last_checkpoint finds no other name.
# Control: the same copy under the name best-checkpoint-3 stays, and get_last_checkpoint passes over
#   checkpoint-99-best.
# What to do: keep copies outside the output directory, or under a name that begins otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  'torch==2.13.0' 'transformers==5.17.0' 'accelerate==1.15.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" OMP_NUM_THREADS=2
venv/bin/python - <<'EOF'
import os
import shutil

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
rows = [[i % 32, i * 7 % 32, 3, 4] for i in range(24)]
data = [{"input_ids": row, "labels": row} for row in rows]


def train(steps):
    """Train a tiny random Llama model up to a step, from its last checkpoint if it has one."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    ))
    args = TrainingArguments(
        output_dir="out", per_device_train_batch_size=2, save_steps=3, save_total_limit=2,
        max_steps=steps, report_to=[], disable_tqdm=True, use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint("out") if os.path.isdir("out") else None)
    return sorted(os.listdir("out"))


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("3 steps:", train(3))
for name in ("checkpoint-3-best", "best-checkpoint-3"):
    shutil.copytree("out/checkpoint-3", f"out/{name}")
print("copied: ", sorted(os.listdir("out")))
kept = {steps: train(steps) for steps in (6, 9)}
for steps, names in kept.items():
    print(f"{steps} steps:", names)
os.makedirs("out/checkpoint-99-best")
print("last:   ", get_last_checkpoint("out"))
assert all("best-checkpoint-3" in names for names in kept.values()), "control: this copy stays"
assert get_last_checkpoint("out") == "out/checkpoint-9", "control: other names are passed over"
assert "checkpoint-3-best" not in kept[9], "changed: the copy stays"
print("As described: the copy checkpoint-3-best was deleted.")
EOF
