#!/usr/bin/env bash
# split_between_processes(apply_padding=True), gathered and cut, mixes up rows on 3 processes.
#
# Versions: accelerate 1.15.0, torch 2.13.0.
# What happens: EACH process with an item less is padded (with the last item), so after gather() the
#   padding is not only at the end. Seven rows on 3 processes come back as 0 1 2 3 4 6 5 6 6. The
#   documentation says "drop the padded elements afterwards"; cut to seven, rows 5 and 6 are
#   exchanged, and each gets the other's answer. No error, and the number of rows is right. Two
#   processes always give the right order, so a test with two does not find it.
# A good guess: gather(...)[:7] are the 7 items in order.
# What to do: gather the items' numbers too and sort by them, or split without padding and use
#   gather_object, which takes lists of different lengths.
# Control: 2 processes, and 3 processes without padding. There the good guess holds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --no-compile 'torch==2.13.0' 'accelerate==1.15.0'
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf" OMP_NUM_THREADS=1
cat >split.py <<'PYTHON'
from importlib.metadata import version

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object

state = PartialState(cpu=True)
items = list(range(7))
with state.split_between_processes(torch.tensor(items), apply_padding=True) as mine:
    padded = gather(mine).tolist()
with state.split_between_processes(items) as mine:
    unpadded = gather_object(mine)
if state.is_main_process:
    print(f"accelerate {version('accelerate')}, {state.num_processes} processes, items {items}")
    print(f"  padded: gathered {padded}, cut {padded[:7]}; without padding {unpadded}")
    assert unpadded == items, "the control without padding fails"
    if state.num_processes == 2:
        assert padded[:7] == items, "the control with 2 processes fails"
    else:
        assert padded[:7] == [0, 1, 2, 3, 4, 6, 5], "behaviour has changed"
state.destroy_process_group()
PYTHON
for processes in 3 2; do
    venv/bin/torchrun --standalone --nproc_per_node "$processes" split.py 2>errors.txt || {
        grep -E 'Error' errors.txt | head -n 3
        exit 1
    }
done
