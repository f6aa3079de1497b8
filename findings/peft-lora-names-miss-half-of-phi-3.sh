#!/usr/bin/env bash
# The usual seven LoRA names reach only half of Phi-3's kinds of linear layers, silently.
#
# Versions: PEFT 0.21.2, transformers 5.17.0, torch 2.13.0.
# What happens: LoRA recipes name q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj. Phi-3 has
#   q, k and v in one layer (qkv_proj), gate and up in another (gate_up_proj). PEFT puts adapters on
#   o_proj and down_proj and ignores the five names it does not find. No warning.
# Seen: on a tiny Phi-3 the adapter has 640 weights, 36% of the 1,792 that target_modules="all-linear"
#   gives. No attention score and no gate of the MLP can be adapted directly.
# A good guess: an error or a warning names the five names that match nothing. PEFT does raise an error,
#   but only when none of the names match.
# Control 1: on a Llama of the same sizes the seven names reach every layer that "all-linear" reaches.
# Control 2: a list in which no name matches is an error.
# What to do: target_modules="all-linear", or compare model.targeted_module_names with the linear layers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  'torch==2.13.0' 'transformers==5.17.0' 'accelerate==1.15.0' 'peft==0.21.2'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" OMP_NUM_THREADS=2
venv/bin/python - <<'EOF'
import warnings

import peft
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapt(config_class, names):
    """Put LoRA on a tiny random model; return the kinds of layers reached and the adapter's size."""
    model = AutoModelForCausalLM.from_config(config_class(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))
    config = peft.LoraConfig(target_modules=names, r=4, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would end the script
        adapted = peft.get_peft_model(model, config)
    kinds = sorted({name.split(".")[-1] for name in adapted.targeted_module_names})
    return kinds, adapted.get_nb_trainable_parameters()[0]


print(f"PEFT {peft.__version__}, transformers {transformers.__version__}")
seen = {}
for config_class in (Phi3Config, LlamaConfig):
    for label, names in (("seven names", SEVEN), ("all-linear", "all-linear")):
        kinds, size = seen[config_class.model_type, label] = adapt(config_class, names)
        print(f"{config_class.model_type:5} {label:11} {size:5,} weights: {' '.join(kinds)}")
assert seen["llama", "seven names"] == seen["llama", "all-linear"], "control: all layers were expected"
try:
    adapt(Phi3Config, ["no_such_name"])
    raise SystemExit("control: an error was expected where no name matches")
except ValueError as error:
    print(f"no name matches: ValueError: {str(error)[:60]}...")
assert seen["phi3", "all-linear"][0] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
assert seen["phi3", "seven names"][0] == ["down_proj", "o_proj"], "changed: other layers are reached"
assert seen["phi3", "seven names"][1] < 0.4 * seen["phi3", "all-linear"][1], "changed: another size"
print("As described: on Phi-3 five of the seven names match nothing, without a word.")
EOF
