#!/usr/bin/env bash
# After the system prompt in your module is edited, datasets.map still returns the old prompts.
#
# Versions: datasets 5.2.0.
# What happens: map() caches its result on disk under a hash of the function. A function of the script
#   itself is hashed with its code and the global values it uses. A function imported from a module is
#   hashed by its module and name only. Edit the module, run again: the cached rows come back.
# Seen: prompts.py says "Be brief." in the first run, "Think first." in the second. Both runs give the
#   prompt "Be brief. 2+2". No message. So a prompt experiment may train on the previous prompt.
# A good guess: a changed function is run again, as its hash is said to cover the function.
# Control: the same edit to the same function, kept in the script itself, is noticed.
# What to do: pass what may change as fn_kwargs={"system": prompts.SYSTEM}, which is hashed by value (tried); or
#   load_from_cache_file=False; or keep the function in the script.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq 'datasets==5.2.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" HF_DATASETS_DISABLE_PROGRESS_BARS=1
export PYTHONDONTWRITEBYTECODE=1 # Python itself must not reuse a compiled prompts.py

echo '{"question": "2+2"}' >rows.jsonl
write_function() { # $1: the file, $2: the system prompt
  printf 'SYSTEM = "%s"\n\n\ndef make_prompt(row):\n' "$2" >"$1"
  echo '    return {"prompt": SYSTEM + " " + row["question"]}' >>"$1"
}
write_script() { # $1: the script; adds what loads and maps the rows
  cat >>"$1" <<'EOF'
from datasets import load_dataset

rows = load_dataset("json", data_files="rows.jsonl", split="train")
print(rows.map(make_prompt)[0]["prompt"])
EOF
}

echo "datasets $(venv/bin/python -c 'import datasets; print(datasets.__version__)')"
declare -A seen
for system in "Be brief." "Think first."; do
  write_function prompts.py "$system"
  echo 'from prompts import make_prompt' >imports.py
  write_script imports.py
  write_function holds.py "$system"
  write_script holds.py
  for script in imports holds; do
    seen[$script,$system]=$(venv/bin/python $script.py)
  done
  echo "system prompt '$system': imported function gives '${seen[imports,$system]}'," \
    "the script's own gives '${seen[holds,$system]}'"
done
fail() { echo "$1" >&2; exit 1; }
[ "${seen[imports,Be brief.]}" = "Be brief. 2+2" ] || fail "the first run does not give its own prompt"
[ "${seen[holds,Think first.]}" = "Think first. 2+2" ] || fail "control: the edit should be noticed"
[ "${seen[imports,Think first.]}" = "Be brief. 2+2" ] || fail "changed: the edit of a module is noticed"
echo "As described: the imported function's old result is returned after the edit."
