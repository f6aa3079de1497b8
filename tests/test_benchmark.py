"""The GPU table of tests/benchmark.py, at a tiny shape on a CPU."""

import re


def test_every_row_of_the_gpu_table_has_numbers(request):
    output, errors = request.session.gpu_table.communicate(timeout=600)
    assert request.session.gpu_table.returncode == 0, errors[-3000:]
    _, _, *rows = [line for line in output.splitlines() if line.startswith("|")]
    assert len(rows) >= 4, output
    for row in rows:
        cells = [re.match(r"[0-9.]+", c.replace(",", "")) for c in row.strip("| ").split(" | ")[1:]]
        assert len(cells) == 5 and all(cell and float(cell[0]) > 0 for cell in cells), row
