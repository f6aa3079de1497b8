"""Draw README's pictures from the records in assets/runs.

pip install matplotlib==3.11.2
python assets/figures.py
"""

import json
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from assets.record import time_split  # noqa: E402
from rewards import is_lenient_correct  # noqa: E402

REWARDS = ["xmlcount", "soft_format", "strict_format", "int", "simple_correctness"]
COLORS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756"]
INK = "#6e7781"  # readable on white and on black


def load(name: str) -> tuple[list[dict], dict[str, list[float]]]:
    folder = HERE / "runs" / name
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return metrics, json.loads((folder / "timers.json").read_text())


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of the last `width` steps."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def panel(ax, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.tick_params(which="both", colors=INK, labelsize=8)
    ax.patch.set_alpha(0)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def p1(name: str = "laptop-42", file: str = "p1.png") -> None:
    """Where the time of a step goes, and the five rewards with strict and lenient accuracy."""
    metrics, timers = load(name)
    steps = range(1, len(metrics) + 1)
    parts = time_split(metrics, timers)
    total = sum(parts.values())
    rewards = [(name, sum(timers[f"{name}_reward_func"]) / len(metrics)) for name in REWARDS]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), gridspec_kw={"width_ratios": [1.15, 1, 1.3]})
    rows = [*[(n, t, COLORS[0]) for n, t in parts.items()], *[(f"  {n}", t, COLORS[4]) for n, t in rewards]][::-1]
    left.barh([n for n, _, _ in rows], [1000 * t for _, t, _ in rows], color=[c for _, _, c in rows])
    left.set_xscale("log")
    for i, (_, t, _) in enumerate(rows):
        left.text(
            1000 * t * 1.15,
            i,
            f"{100 * t / total:.{0 if t / total > 0.01 else 3}f}%",
            va="center",
            fontsize=7,
            color=INK,
        )
    left.set_xlim(right=left.get_xlim()[1] * 4)
    panel(left, f"milliseconds of a step of {total:.2f} s")
    for reward, most, color in zip(REWARDS, [0.5, 0.5, 0.5, 0.5, 2.0], COLORS, strict=True):
        curve = smooth([m[f"rewards/{reward}_reward_func/mean"] / most for m in metrics])
        middle.plot(steps, curve, color=color, label=reward)
    middle.set_ylim(-0.05, 1.05)
    middle.legend(fontsize=7, frameon=False, labelcolor=INK, loc="lower right")
    panel(middle, "rewards, of the most they pay")
    for key, color, label in (
        ("lenient", COLORS[0], "lenient: right in any form"),
        ("strict", COLORS[4], "strict: right and readable"),
    ):
        right.plot(steps, smooth([m[f"accuracy/{key}"] for m in metrics]), color=color, label=label)
    right.set_ylim(0, 1)
    right.legend(fontsize=7, frameon=False, labelcolor=INK, loc="lower right")
    panel(right, "accuracy of the sampled completions")
    for ax, label in ((left, "log scale"), (middle, "step (means of the last five)"), (right, "step")):
        ax.set_xlabel(label, color=INK, fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / file, dpi=130, transparent=True, metadata={"Software": None})


def card(sample: dict, title: str, why: str, file: str) -> None:
    """A completion as it was sampled, and what each reward gave it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.0), gridspec_kw={"width_ratios": [1.6, 1]})
    for ax in (left, right):
        ax.axis("off")
    left.set_title(f"{title} (step {sample['step']})", loc="left", fontsize=11, color=INK, fontweight="bold")
    left.text(0, 0.97, textwrap.fill(sample["question"], 72), va="top", fontsize=9, color=INK, style="italic")
    lines = [textwrap.fill(line, 80) for line in sample["completion"].split("\n")]
    left.text(0, 0.74, "\\n\n".join(lines), va="top", fontsize=9, family="monospace", color=COLORS[0])
    values = [(name, sample[f"{name}_reward_func"]) for name in REWARDS]
    rows = [*values, ("reward", sum(v for _, v in values)), ("advantage in its group", sample["advantage"])]
    for i, (name, value) in enumerate(rows):
        weight, y = "bold" if i == len(REWARDS) else "normal", 0.97 - 0.105 * i
        right.text(0, y, name, va="top", fontsize=9, color=INK, fontweight=weight)
        color = COLORS[2] if value > 0 else COLORS[4] if value < 0 else INK
        right.text(0.62, y, f"{value:+.2f}", va="top", ha="right", fontsize=9, color=color, fontweight=weight)
    right.text(0, 0.18, textwrap.fill(why, 58), va="top", fontsize=9, color=INK, style="italic")
    figure.tight_layout()
    figure.savefig(HERE / file, dpi=130, transparent=True, metadata={"Software": None})


def p2_and_p3(name: str = "laptop-42") -> None:
    """A correct but shallow answer from the end of the run, and a failure from its beginning."""
    samples = json.loads((HERE / "runs" / name / "samples.json").read_text())
    full = [s for s in samples if s["simple_correctness_reward_func"] == 2 and s["strict_format_reward_func"] == 0.5]
    why = "All five rewards are paid in full. Between the tags stands what the untrained model writes in prose: "
    why += "the form is new, the reasoning is not."
    long = max(full, key=lambda s: (s["completion"].count("\n"), s["step"]))
    card(long, "Correct, and shallow", why, "p2.png")
    lost = [s for s in samples if s["int_reward_func"] == 0 and is_lenient_correct(s["completion"], s["gold"])]
    why = "The answer is right, but there is no tag: the whole text counts as the answer, and it is neither a number "
    why += "nor the gold string. Nothing is paid."
    card(lost[0], "An early failure", why, "p3.png")


if __name__ == "__main__":
    p1()
    p2_and_p3()
