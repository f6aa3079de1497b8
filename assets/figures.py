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
    """Return the mean of the last `width` steps at each step."""
    windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def panel(ax, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.tick_params(which="both", colors=INK, labelsize=8)
    ax.patch.set_alpha(0)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def save(figure, file: str) -> None:
    figure.tight_layout()
    figure.savefig(HERE / file, dpi=130, transparent=True, metadata={"Software": None})


def draw_time(ax, metrics: list[dict], timers: dict[str, list[float]]) -> None:
    """Draw the parts of a step as bars, the five rewards one by one below them."""
    parts = time_split(metrics, timers)
    total = sum(parts.values())
    rewards = [(name, sum(timers[f"{name}_reward_func"]) / len(metrics)) for name in REWARDS]
    rows = [(name, seconds, COLORS[0]) for name, seconds in parts.items()]
    rows += [(f"  {name}", seconds, COLORS[4]) for name, seconds in rewards]
    names, seconds, colors = zip(*reversed(rows), strict=True)
    ax.barh(names, [1000 * t for t in seconds], color=colors)
    ax.set_xscale("log")
    for i, t in enumerate(seconds):
        text = f"{100 * t / total:.2g}%" if t / total >= 1e-5 else "< 0.001%"
        ax.text(1000 * t * 1.15, i, text, va="center", fontsize=7, color=INK)
    ax.set_xlim(right=ax.get_xlim()[1] * 4)
    panel(ax, f"milliseconds of a step of {total:.2f} s")


def draw_rewards(ax, metrics: list[dict]) -> None:
    for reward, most, color in zip(REWARDS, [0.5, 0.5, 0.5, 0.5, 2.0], COLORS, strict=True):
        curve = smooth([m[f"rewards/{reward}_reward_func/mean"] / most for m in metrics])
        ax.plot(range(1, len(metrics) + 1), curve, color=color, label=reward)
    ax.set_ylim(top=1.05)
    panel(ax, "rewards, of the most they pay")


def draw_accuracy(ax, metrics: list[dict], name: str) -> None:
    """Draw lenient and strict accuracy, and for a Qwen run its stray closing tags."""
    steps = range(1, len(metrics) + 1)
    for key, color, label in (
        ("lenient", COLORS[0], "lenient: right in any form"),
        ("strict", COLORS[4], "strict: right and in tags"),
    ):
        ax.plot(steps, smooth([m[f"accuracy/{key}"] for m in metrics]), color=color, label=label)
    if "qwen" in name:
        ends = json.loads((HERE / "runs" / name / "endings.json").read_text())
        ends = [ends[f"step {step}"] for step in steps]
        tail = [sum(end.get(stray, 0) for stray in STRAY) / sum(end.values()) for end in ends]
        label = "with </reasoning> after the answer"
        ax.plot(steps, smooth(tail), color=COLORS[2], label=label)
    ax.set_ylim(0, 1.05)
    panel(ax, "share of the sampled completions")


def p1(name: str = "laptop-42", file: str = "p1.png") -> None:
    """Draw the time of a step, the five rewards, strict and lenient accuracy."""
    metrics, timers = load(name)
    widths = {"width_ratios": [1.15, 1, 1.3]}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4.0), gridspec_kw=widths)
    draw_time(left, metrics, timers)
    draw_rewards(middle, metrics)
    draw_accuracy(right, metrics, name)
    labels = ("log scale", "step (means of the last five)", "step")
    for ax, label in zip((left, middle, right), labels, strict=True):
        ax.set_xlabel(label, color=INK, fontsize=8)
    for ax, columns in ((middle, 2), (right, 1)):
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.17), "ncols": columns}
        ax.legend(fontsize=7, frameon=False, labelcolor=INK, **below)
    save(figure, file)


def write_rewards(ax, sample: dict) -> float:
    """Write what each reward gave a completion; return where the text below may begin."""
    values = [(name, sample[f"{name}_reward_func"]) for name in REWARDS]
    total = sum(value for _, value in values)
    rows = [*values, ("reward", total), ("advantage in its group", sample["advantage"])]
    for i, (name, value) in enumerate(rows):
        style = {"va": "top", "fontsize": 9, "fontweight": "bold" if i == len(values) else "normal"}
        y, color = 0.05 + 0.24 * i, COLORS[2] if value > 0 else COLORS[4] if value < 0 else INK
        ax.text(0, y, name, color=INK, **style)
        ax.text(0.62, y, f"{value:+.3f}", ha="right", color=color, **style)
    return 0.25 + 0.24 * len(rows)


def card(sample: dict, title: str, why: str, file: str) -> None:
    """Draw a completion as it was sampled and its rewards; `\\n` marks its newlines."""
    question = textwrap.fill(sample["question"], 76)
    text = "\\n\n".join(textwrap.fill(line, 84) for line in sample["completion"].split("\n"))
    line, top = 0.15, 0.35 + 0.15 * (1 + question.count("\n"))  # inches
    height = max(3.2, top + line * (1 + text.count("\n")) + 0.35)
    widths = {"width_ratios": [1.75, 1]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), gridspec_kw=widths)
    for ax in (left, right):
        ax.axis("off")
        ax.set_ylim(height - 0.35, 0)  # inches from the title down
    title = f"{title} (step {sample['step']})"
    left.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    plain = {"va": "top", "parse_math": False}
    italic = plain | {"fontsize": 9, "color": INK, "style": "italic"}
    left.text(0, 0.05, question, **italic)
    left.text(0, top - 0.1, text, fontsize=8.5, family="monospace", color=COLORS[0], **plain)
    right.text(0, write_rewards(right, sample), textwrap.fill(why, 56), **italic)
    save(figure, file)


def p2_and_p3(name: str = "qwen-half-b") -> None:
    """Draw a correct but shallow answer from the end of a run, and a failure from its beginning."""
    samples = json.loads((HERE / "runs" / name / "samples.json").read_text())
    hacked = [s for s in samples if s["completion"].endswith(f"</answer>{STRAY[0]}")]
    shallow = [s for s in hacked if s["simple_correctness_reward_func"] == 2][-1]
    less = count_xml(shallow["completion"].removesuffix(STRAY[0]))
    why = (
        "The number is right, the sentences half make sense: correctness looks at the number "
        "alone. Nobody asked for the second </reasoning>. It pays: ending in </answer>, the same "
        f"text is penalized for its whole length and gets {less:.3f} from xmlcount instead of "
        f"{shallow['xmlcount_reward_func']:.3f}."
    )
    card(shallow, "Correct, and shallow: Qwen2.5-Coder-0.5B", why, "p2.png")
    ended = [s for s in samples[:10] if s["completion"].endswith("</answer>")]
    lost = min(ended, key=lambda s: s["xmlcount_reward_func"])
    why = (
        "int pays for a number between the tags, right or wrong. But <reasoning> is never closed, "
        "so both format rewards are 0. No newline follows </answer>, so xmlcount subtracts 0.001 "
        f"for each of the {len(lost['completion']) - 1} characters before its last: more than all "
        "its tags earn."
    )
    card(lost, "An early failure: Qwen2.5-Coder-0.5B", why, "p3.png")


if __name__ == "__main__":
    p1()
    p1("qwen-half-b", "p4.png")
    p2_and_p3()
