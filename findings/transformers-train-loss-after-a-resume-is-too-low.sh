#!/usr/bin/env bash
# The train_loss that train() reports after a resume is too low, by as much as was already trained.
#
# Versions: transformers 5.17.0 (Trainer, and so TRL 1.16.0), accelerate 1.15.0, torch 2.13.0.
# What happens: train_loss is the sum of the losses of THIS start divided by the steps of ALL starts.
#   A run resumed for its last tenth reports a tenth of its loss. The steps per second are wrong the
#   other way: all steps are divided by the seconds of this start.
# Seen: 20 steps, resumed at step 18: same final weights and the same logged losses, about 3.4 each, but
#   train_loss 0.33 instead of 3.42.
# A good guess: the mean over the whole run, or over the steps since the resume.
# Control: the unbroken run's train_loss equals the mean of its logged losses.
# What to do: take the mean of the "loss" entries in trainer.state.log_history, which survives a resume.
#   Do not compare train_loss or train_steps_per_second of runs that were resumed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  'torch==2.13.0' 'transformers==5.17.0' 'accelerate==1.15.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" OMP_NUM_THREADS=2
venv/bin/python - <<'EOF'
import torch
import transformers
from transformers import (
    LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed,
)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
rows = [[i % 32, i * 7 % 32, 3, 4] for i in range(40)]
data = [{"input_ids": row, "labels": row} for row in rows]


def run(resume=None):
    """Train 20 steps; return train_loss, the logged losses (one a step) and the weights."""
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    ))
    args = TrainingArguments(
        output_dir="out", per_device_train_batch_size=2, num_train_epochs=1, save_steps=9,
        logging_steps=1, learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    reported = trainer.train(resume_from_checkpoint=resume).metrics["train_loss"]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return reported, losses, torch.cat([p.detach().flatten() for p in model.parameters()])


mean = lambda values: sum(values) / len(values)
loss, losses, weights = run()
resumed_loss, resumed_losses, resumed_weights = run(resume="out/checkpoint-18")
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"unbroken run:       train_loss {loss:.3f}, mean of its 20 logged losses {mean(losses):.3f}")
print(f"resumed at step 18: train_loss {resumed_loss:.3f}, mean of all 20 {mean(resumed_losses):.3f},"
      f" of the last two {mean(resumed_losses[18:]):.3f}")
assert torch.equal(weights, resumed_weights) and losses == resumed_losses, "the runs differ"
assert abs(loss - mean(losses)) < 1e-3, "control: the mean of the losses was expected"
assert abs(resumed_loss - sum(losses[18:]) / 20) < 1e-3, "changed: another train_loss after a resume"
assert resumed_loss < 0.2 * min(losses), "changed: train_loss is near the losses"
print("As described: two losses are summed and divided by all twenty steps.")
EOF
