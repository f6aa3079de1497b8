"""What assets/research/record.py makes of the W&B files of a run that was killed and resumed."""

from pathlib import Path

import pytest

from assets.research import record

TIMER = "profiling/Time taken: GRPOTrainer."


def step(number: int, seconds: float, reward: float) -> list[dict]:
    """Return the rows of a step: a timer, two rows of another one, the metrics."""
    times = [("generate", seconds), ("compute_loss", seconds / 2), ("compute_loss", seconds / 4)]
    rows = [{TIMER + name: time} for name, time in times]
    return [*rows, {"train/global_step": number, "train/reward": reward}]


@pytest.fixture
def collected(tmp_path, monkeypatch) -> record.Log:
    """Return the log of a run killed in step 4 and resumed at step 2, then killed in step 5."""
    first = [row for n in (1, 2, 3) for row in step(n, n, n / 10)] + step(4, 4, 0)[:2]
    second = [row for n in (3, 4) for row in step(n, 10 * n, n)] + step(5, 50, 0)[:1]
    files = {}
    for name, rows in (("20260101_1", first), ("20260101_2", second)):
        file = tmp_path / f"wandb/offline-run-{name}-x/run-x.wandb"
        file.parent.mkdir(parents=True)
        file.touch()
        clocked = [row | {"_runtime": float(i)} for i, row in enumerate(rows, 1)]
        files[file] = clocked, {"args": [name]}
    monkeypatch.setattr(record, "read_wandb", lambda file: files[Path(file)])
    return record.collect(tmp_path)


def test_a_repeated_step_counts_once_with_its_last_values(collected):
    assert [m["global_step"] for m in collected.metrics] == [1, 2, 3, 4]
    assert [m["reward"] for m in collected.metrics] == [0.1, 0.2, 3, 4]
    assert collected.started["resumed"] == 1 and collected.started["args"] == ["20260101_1"]


def test_each_step_keeps_its_own_timers(collected):
    """Timers of a step that was cut off, in either file, are in no list."""
    assert collected.timers["generate"] == [1, 2, 30, 40]
    assert collected.timers["compute_loss"] == [0.5, 0.25, 1, 0.5, 15, 7.5, 20, 10]


def test_the_clock_goes_on(collected):
    assert [m["runtime"] for m in collected.metrics] == [4, 8, 14 + 4, 14 + 8]
    assert collected.started["seconds"] == 14 + 9
