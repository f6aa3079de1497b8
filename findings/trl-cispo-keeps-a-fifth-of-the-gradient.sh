#!/usr/bin/env bash
# loss_type="cispo" with TRL's own epsilon silently keeps one fifth of the policy gradient.
#
# Versions: TRL 1.16.0, transformers 5.17.0, torch 2.13.0.
# What happens: CISPO caps the importance ratio at epsilon_high. TRL takes epsilon_high from epsilon
#   when it is unset, and epsilon is 0.2 by default. The other losses cap at 1 + epsilon; CISPO caps at
#   0.2 itself. On-policy the ratio is 1, so every token's weight is cut from 1 to 0.2. There is no
#   warning. The KL term (beta) is added after this factor, so beta weighs five times as much.
# Seen: the first gradient norm is 0.200 of the one with loss_type="dapo"; the samples, rewards and
#   normalization are the same.
# A good guess: the cap is 1 + epsilon = 1.2, as for the other losses; an on-policy step is equal to dapo's.
# Control: with epsilon_high=5.0 the ratio to dapo is 1.000.
# What to do: set epsilon_high=5.0 (named in TRL's documentation of epsilon_high) with cispo. A high
#   cispo_clip_ratio at the first step, before anything can be off-policy, is the sign of this.
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
    LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed,
)

transformers.logging.set_verbosity_error()
words = ["<pad>", "</s>"] + [f"w{i}" for i in range(30)]
core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
data = Dataset.from_dict({"prompt": [f"w{i}" for i in range(8)]})


def count_words(completions, **kwargs):
    return [float(len(set(text.split()))) for text in completions]


def first_step(**settings):
    """Return the log of one on-policy GRPO step of a tiny random Llama model."""
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    ))
    args = trl.GRPOConfig(
        output_dir="out", max_steps=1, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=8, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, bf16=False, **settings,
    )
    trainer = trl.GRPOTrainer(model, count_words, args, data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]


dapo = first_step(loss_type="dapo")
cispo = first_step(loss_type="cispo")
control = first_step(loss_type="cispo", epsilon_high=5.0)
print(f"TRL {trl.__version__}, transformers {transformers.__version__}")
shares = {}
for name, log in (("dapo", dapo), ("cispo", cispo), ("cispo, epsilon_high=5.0", control)):
    shares[name] = log["grad_norm"] / dapo["grad_norm"]
    print(f"{name:24} reward {log['reward']:.4f}  gradient norm, share of dapo's: {shares[name]:.3f}"
          f"  cispo_clip_ratio: {log.get('cispo_clip_ratio', '-')}")
assert dapo["reward"] == cispo["reward"] == control["reward"], "the samples differ"
assert dapo["grad_norm"] > 0, "there is no gradient to compare"
assert abs(shares["cispo, epsilon_high=5.0"] - 1) < 1e-3, "control: the full gradient was expected"
assert abs(shares["cispo"] - 0.2) < 1e-3, "changed: cispo no longer keeps exactly one fifth"
print("As described: cispo keeps one fifth of the gradient at the default epsilon.")
EOF
