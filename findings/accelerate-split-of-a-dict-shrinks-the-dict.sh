#!/usr/bin/env bash
# split_between_processes cuts the dict you pass to it, so using the dict again loses rows.
#
# Versions: accelerate 1.15.0, torch 2.13.0.
# What happens: given a dict of columns, split_between_processes writes each process's share back
#   into the caller's dict. After the with block the dict holds only this process's rows. A second
#   pass (another temperature, the next checkpoint) splits the share again: of 8 questions on 2
#   processes the first pass answers 8, the second 4, the third 2. No error. On one process the dict
#   is unchanged, so a trial there does not show it.
# A good guess: the dict is unchanged, as a list or a tensor is.
# What to do: pass a copy, dict(rows), or a list of rows.
# Control: dict(rows) and a plain list. There the good guess holds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile 'torch==2.13.0' 'accelerate==1.15.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" OMP_NUM_THREADS=1
cat >split.py <<'PYTHON'
from importlib.metadata import version

from accelerate import PartialState
from accelerate.utils import gather_object

state = PartialState(cpu=True)


def passes(rows, column, before=lambda rows: rows):
    """Return the questions that all processes see together, in each of three passes over rows."""
    seen = []
    for _ in range(3):
        with state.split_between_processes(before(rows)) as mine:
            seen.append(gather_object(column(mine)))
    return seen


def question(rows):
    return rows["question"]


questions = list(range(8))
as_dict = passes({"question": list(questions)}, question)
as_copy = passes({"question": list(questions)}, question, before=dict)
as_list = passes(list(questions), list)
if state.is_main_process:
    print(f"accelerate {version('accelerate')}, {state.num_processes} processes, 8 questions")
    print("  a dict, three passes: ", as_dict)
    print("  dict(rows), a list:    all 8 in each pass:", as_copy == as_list == [questions] * 3)
    assert [len(seen) for seen in as_dict] == [8, 4, 2], "behaviour has changed"
    assert as_copy == as_list == [questions] * 3, "the control fails"
state.destroy_process_group()
PYTHON
venv/bin/torchrun --standalone --nproc_per_node 2 split.py 2>errors.txt || {
    grep -E 'Error' errors.txt | head -n 3
    exit 1
}
