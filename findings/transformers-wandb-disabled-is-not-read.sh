#!/usr/bin/env bash
# WANDB_DISABLED=true no longer disables W&B: transformers 5 opens a run all the same, and says nothing.
#
# Versions: transformers 5.17.0 (Trainer, and so all of TRL's), wandb 0.31.0, torch 2.13.0.
# What happens: transformers 4 read the variable and warned that version 5 would not. Version 5 has dropped
#   the variable and the warning; wandb itself never read it. A script with report_to="wandb" and this line
#   in a notebook, a job file or a test's environment logs again: online, where there is a key.
# Seen: WANDB_DISABLED=true: one run file, with the loss of the step in it. No word about the variable.
# A good guess: off, as many notebooks say; or an error, as in late versions of transformers 4.
# Control: WANDB_MODE=disabled leaves no run file.
# What to do: WANDB_MODE=disabled, which wandb reads, or report_to="none".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  'torch==2.13.0' 'transformers==5.17.0' 'accelerate==1.15.0' 'wandb==0.31.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" OMP_NUM_THREADS=2
cat >train.py <<'EOF'
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

transformers.utils.logging.disable_progress_bar()
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
))
args = TrainingArguments(
    output_dir="out", max_steps=1, logging_steps=1, save_strategy="no", report_to="wandb",
    disable_tqdm=True, use_cpu=True,
)
Trainer(model, args, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}] * 8).train()
EOF
runs() { # $1: folder of W&B's files; the rest: the environment
  mkdir "$1"
  env WANDB_DIR="$work/$1" "${@:2}" venv/bin/python train.py >log 2>&1 || { cat log >&2; exit 1; }
  find "$1" -name '*.wandb'
}
venv/bin/pip list --disable-pip-version-check | grep -E '^(transformers|wandb|torch) '
old=$(runs old WANDB_DISABLED=true WANDB_MODE=offline) # offline: the check needs no account
warned=$(grep -c WANDB_DISABLED log || true)
new=$(runs new WANDB_MODE=disabled)
printf 'WANDB_DISABLED=true: %s\nWANDB_MODE=disabled: %s\n' "${old:-no run}" "${new:-no run}"
fail() { echo "$1" >&2; exit 1; }
[ -z "$new" ] || fail "control: WANDB_MODE=disabled should leave no run"
[ -n "$old" ] && [ "$warned" = 0 ] || fail "changed: WANDB_DISABLED is read, or warned of, again"
venv/bin/python -m wandb leet inspect --json "$old" >kept
grep -q '"train/loss"' kept || fail "changed: no loss in the run"
echo "As described: WANDB_DISABLED=true is not read, a run is opened; WANDB_MODE=disabled opens none."
