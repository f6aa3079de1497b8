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
from assets.tables import STRAY  # noqa: E402
from rewards import count_xml  # noqa: E402

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

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4.0), gridspec_kw={"width_ratios": [1.15, 1, 1.3]})
    rows = [*[(n, t, COLORS[0]) for n, t in parts.items()], *[(f"  {n}", t, COLORS[4]) for n, t in rewards]][::-1]
    left.barh([n for n, _, _ in rows], [1000 * t for _, t, _ in rows], color=[c for _, _, c in rows])
    left.set_xscale("log")
    for i, (_, t, _) in enumerate(rows):
        left.text(
            1000 * t * 1.15,
            i,
            f"{100 * t / total:.2g}%" if t / total >= 1e-5 else "< 0.001%",
            va="center",
            fontsize=7,
            color=INK,
        )
    left.set_xlim(right=left.get_xlim()[1] * 4)
    panel(left, f"milliseconds of a step of {total:.2f} s")
    for reward, most, color in zip(REWARDS, [0.5, 0.5, 0.5, 0.5, 2.0], COLORS, strict=True):
        curve = smooth([m[f"rewards/{reward}_reward_func/mean"] / most for m in metrics])
        middle.plot(steps, curve, color=color, label=reward)
    middle.set_ylim(top=1.05)
    panel(middle, "rewards, of the most they pay")
    for key, color, label in (
        ("lenient", COLORS[0], "lenient: right in any form"),
        ("strict", COLORS[4], "strict: right and readable"),
    ):
        right.plot(steps, smooth([m[f"accuracy/{key}"] for m in metrics]), color=color, label=label)
    if "qwen" in name:
        ends = json.loads((HERE / "runs" / name / "endings.json").read_text())
        ends = [ends[f"step {step}"] for step in steps]
        tail = [sum(end.get(stray, 0) for stray in STRAY) / sum(end.values()) for end in ends]
        right.plot(steps, smooth(tail), color=COLORS[2], label="with </reasoning> after the answer")
    right.set_ylim(0, 1.05)
    panel(right, "share of the sampled completions")
    for ax, label in ((left, "log scale"), (middle, "step (means of the last five)"), (right, "step")):
        ax.set_xlabel(label, color=INK, fontsize=8)
    for ax, columns in ((middle, 2), (right, 1)):
        ax.legend(fontsize=7, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(0, -0.17), ncols=columns)
    figure.tight_layout()
    figure.savefig(HERE / file, dpi=130, transparent=True, metadata={"Software": None})


def card(sample: dict, title: str, why: str, file: str) -> None:
    """A completion as it was sampled, and what each reward gave it; `\\n` marks its newlines."""
    question = textwrap.fill(sample["question"], 76)
    text = "\\n\n".join(textwrap.fill(line, 84) for line in sample["completion"].split("\n"))
    line, top = 0.15, 0.35 + 0.15 * (1 + question.count("\n"))  # inches
    height = max(3.2, top + line * (1 + text.count("\n")) + 0.35)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), gridspec_kw={"width_ratios": [1.75, 1]})
    for ax in (left, right):
        ax.axis("off")
        ax.set_ylim(height - 0.35, 0)  # inches from the title down
    left.set_title(f"{title} (step {sample['step']})", loc="left", fontsize=11, color=INK, fontweight="bold")
    left.text(0, 0.05, question, va="top", fontsize=9, color=INK, style="italic", parse_math=False)
    left.text(0, top - 0.1, text, va="top", fontsize=8.5, family="monospace", color=COLORS[0], parse_math=False)
    values = [(name, sample[f"{name}_reward_func"]) for name in REWARDS]
    rows = [*values, ("reward", sum(v for _, v in values)), ("advantage in its group", sample["advantage"])]
    for i, (name, value) in enumerate(rows):
        weight, y = "bold" if i == len(REWARDS) else "normal", 0.05 + 0.24 * i
        right.text(0, y, name, va="top", fontsize=9, color=INK, fontweight=weight)
        color = COLORS[2] if value > 0 else COLORS[4] if value < 0 else INK
        right.text(0.62, y, f"{value:+.3f}", va="top", ha="right", fontsize=9, color=color, fontweight=weight)
    right.text(
        0,
        0.25 + 0.24 * len(rows),
        textwrap.fill(why, 56),
        va="top",
        fontsize=9,
        color=INK,
        style="italic",
        parse_math=False,
    )
    figure.tight_layout()
    figure.savefig(HERE / file, dpi=130, transparent=True, metadata={"Software": None})


def p2_and_p3(name: str = "qwen-half-b") -> None:
    """A correct but shallow answer from the end of the run, and a failure from its beginning."""
    samples = json.loads((HERE / "runs" / name / "samples.json").read_text())
    hacked = [s for s in samples if s["completion"].endswith(f"</answer>{STRAY[0]}")]
    shallow = [s for s in hacked if s["simple_correctness_reward_func"] == 2][-1]
    why = "The number is right, the sentences half make sense: correctness looks at the number alone. And nobody asked "
    why += "for the second </reasoning>. It pays: ending in </answer>, the same text is charged its whole length and "
    less = count_xml(shallow["completion"].removesuffix(STRAY[0]))
    why += f"gets {less:.3f} from xmlcount in place of {shallow['xmlcount_reward_func']:.3f}."
    card(shallow, "Correct, and shallow: Qwen2.5-Coder-0.5B", why, "p2.png")
    ended = [s for s in samples[:10] if s["completion"].endswith("</answer>")]
    lost = min(ended, key=lambda s: s["xmlcount_reward_func"])
    why = "int pays for a number between the tags, right or wrong. But <reasoning> is never closed, so both format "
    why += "rewards are 0; and as no newline follows </answer>, xmlcount takes 0.001 for each of the "
    why += f"{len(lost['completion']) - 1} characters before its last: more than all its tags earn."
    card(lost, "An early failure: Qwen2.5-Coder-0.5B", why, "p3.png")


if __name__ == "__main__":
    p1()
    p1("qwen-half-b", "p4.png")
    p2_and_p3()
