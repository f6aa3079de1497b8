"""The GPU table of tests/benchmark.py, at a tiny shape on a CPU."""

import os
import re
import subprocess
import sys

from conftest import ROOT


def test_every_row_of_the_gpu_table_has_numbers():
    command = [sys.executable, "tests/benchmark.py", "--gpu", "--shape", "tiny"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    _, _, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) >= 4, done.stdout
    for row in rows:
        cells = [re.match(r"[0-9.]+", c.replace(",", "")) for c in row.strip("| ").split(" | ")[1:]]
        assert len(cells) == 5 and all(cell and float(cell[0]) > 0 for cell in cells), row
