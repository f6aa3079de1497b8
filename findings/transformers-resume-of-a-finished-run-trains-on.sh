#!/usr/bin/env bash
# Resuming a run that has reached max_steps trains one more step and changes the weights.
#
# Versions: transformers 5.17.0 (Trainer, and so TRL 1.16.0), accelerate 1.15.0, torch 2.13.0.
# What happens: Trainer asks "is max_steps reached?" only after a step. A job that is started again with
#   resume_from_checkpoint=True and finds the checkpoint of its last step takes one more step. Each
#   further start from what it saved adds another one.
# Seen: max_steps=6 of 12 in an epoch: the resumed run ends at global_step 7, 96% of its weights
#   have moved, and it saves a checkpoint-7. A second restart ends at 8. No warning.
# A good guess: nothing is trained, since the run is complete; train() returns at once.
# Control: a run that ends with its epoch (num_train_epochs=1) stays at its last step, weights unchanged.
# What to do: read global_step in trainer_state.json before resuming and skip train() when it has reached
#   max_steps. With a schedule that decays to 0 the step is taken too, at learning rate 0.
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

import torch
import transformers
from transformers import (
    LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed,
)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
rows = [[i % 32, i * 7 % 32, 3, 4] for i in range(24)]
data = [{"input_ids": row, "labels": row} for row in rows]


def run(folder, resume, **length):
    """Train a tiny random Llama model; return its last step and all its weights."""
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    ))
    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, save_steps=3, learning_rate=1e-3,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, **length,
    )
    trainer = Trainer(model, args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return trainer.state.global_step, weights


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
ends, moved = {}, {}
for folder, length in (("max_steps=6", dict(max_steps=6)), ("one epoch", dict(num_train_epochs=1))):
    runs = [run(folder, resume, **length) for resume in (None, True, True)]
    ends[folder] = [step for step, _ in runs]
    moved[folder] = (runs[1][1] != runs[0][1]).float().mean().item()
    saved = sorted(os.listdir(folder), key=lambda d: int(d.split("-")[1]))
    print(f"{folder:11}: last step of the run, of a restart, of a second restart: {ends[folder]};"
          f" share of weights the restart moved: {moved[folder]:.2f}; {saved}")
assert ends["one epoch"] == [12, 12, 12] and moved["one epoch"] == 0, "control: no step was expected"
assert ends["max_steps=6"] == [6, 7, 8], "changed: a finished run is no longer trained on"
assert moved["max_steps=6"] > 0.9, "changed: the weights stay"
print("As described: each restart of a finished run trains one more step.")
EOF
