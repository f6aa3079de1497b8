#!/usr/bin/env bash
# bf16=False does not switch bf16 off where the launcher asks for it; bf16=True overrides the launcher.
#
# Versions: transformers 5.17.0 (TrainingArguments, and so TRL's GRPOConfig), accelerate 1.15.0,
#   torch 2.13.0.
# What happens: `accelerate launch` hands its mixed_precision (from the flag or from the file that
#   `accelerate config` wrote) over in an environment variable. TrainingArguments starts from the variable
#   and overrides it only when fp16 or bf16 is True. An explicit False changes nothing.
# Seen: launcher bf16, bf16=False: args.bf16 says False, the matrix products are computed in bfloat16.
#   Launcher "no", bf16=True: bfloat16 too. No warning in either case.
# A good guess: an explicit bf16=False means float32; or the launcher wins in both directions.
# Control: launcher "no" and bf16=False compute in float32.
# What to do: read trainer.accelerator.mixed_precision, not args.bf16, for what is really used; start with
#   `accelerate launch --mixed_precision no` for a float32 run.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  'torch==2.13.0' 'transformers==5.17.0' 'accelerate==1.15.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" OMP_NUM_THREADS=2
cat >train.py <<'EOF'
import sys

import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
for flag in sys.argv[1:]:
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    ))
    types = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: types.append(output.dtype)
    )
    args = TrainingArguments(
        output_dir="out", max_steps=1, bf16=flag == "True", save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}] * 8)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    print(f"bf16={args.bf16}, accelerator {trainer.accelerator.mixed_precision}: {types[0]}")
EOF
launch() { # $1: the launcher's precision; the rest: bf16 of TrainingArguments, one run each
  venv/bin/accelerate launch --cpu --num_processes 1 --num_machines 1 --dynamo_backend no \
    --mixed_precision "$1" train.py "${@:2}" 2>log || { cat log >&2; exit 1; }
}
venv/bin/pip list --disable-pip-version-check | grep -E '^(accelerate|transformers|torch) '
no=$(launch no False True)
bf16=$(launch bf16 False)
printf 'launcher no:\n%s\nlauncher bf16:\n%s\n' "$no" "$bf16"
fail() { echo "$1" >&2; exit 1; }
[[ $no == "bf16=False, accelerator no: torch.float32"* ]] || fail "control: float32 was expected"
[[ $no == *"bf16=True, accelerator bf16: torch.bfloat16" ]] ||
  fail "changed: bf16=True no longer overrides the launcher"
[ "$bf16" = "bf16=False, accelerator bf16: torch.bfloat16" ] ||
  fail "changed: bf16=False now overrides the launcher"
echo "As described: bf16=False loses to the launcher, bf16=True wins against it."
