"""The GPU table of assets/research/benchmark.py, at a tiny shape on a CPU."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def gpu_table() -> str:
    """Return what the benchmark prints; 40 s alone on two cores."""
    command = [sys.executable, "-m", "assets.research.benchmark", "--gpu", "--shape", "tiny"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_row_of_the_gpu_table_has_numbers(gpu_table):
    _, _, *rows = [line for line in gpu_table.splitlines() if line.startswith("|")]
    assert len(rows) >= 4, gpu_table
    for row in rows:
        cells = [re.match(r"[0-9.]+", c.replace(",", "")) for c in row.strip("| ").split(" | ")[1:]]
        assert len(cells) == 5 and all(cell and float(cell[0]) > 0 for cell in cells), row
