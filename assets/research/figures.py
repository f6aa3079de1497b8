"""Draw README's pictures from the records in runs/, or one picture of a run of your own.

pip install matplotlib==3.11.2
python -m assets.research.figures                  # README's pictures
python -m assets.research.figures outputs/tiny     # timers and rewards: outputs/tiny/p1.png
"""

import sys
import textwrap
from collections import Counter
from pathlib import Path

try:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from PIL import Image
except ModuleNotFoundError:
    sys.exit("pictures need matplotlib: pip install matplotlib==3.11.2")

from assets.research import tables
from assets.research.record import collect, command_line, time_split
from assets.research.tables import AFTER, LAPTOP, MEASURED, MODELS, QWEN, ROOT, runs
from rewards import EXAMPLES, REWARD_FUNCS

PICTURES = ROOT / "assets/pictures"
REWARDS = [reward.__name__ for reward in REWARD_FUNCS]
NAMES = [reward.removesuffix("_reward_func") for reward in REWARDS]
PERFECT = {"completions": [[{"content": EXAMPLES[0][1]}]], "answer": ["18"]}
MOST = [reward(**PERFECT)[0] for reward in REWARD_FUNCS]  # what a perfect completion earns
COLORS = ["#128c8c", "#e07b16", "#2a962a", "#8e5fbc", "#8c564b"]  # of the rewards
ACCURACY = {"lenient": "#1f6fb4", "strict": "#d62728"}
INK, MARK, TAIL, TIMER = "#333a42", "#f3f58c", "#8f9600", "#5b6b7f"
LINES = "Horizontal: step. Thin: each step. Bold: mean of the last five steps. Dotted: maximum."
INKED = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor")
rcParams |= dict.fromkeys(INKED, INK) | {"figure.titlesize": 11.5, "figure.titleweight": "bold"}
rcParams |= {"font.size": 8.6, "figure.dpi": 200}  # 12 pixels in README's column of 800 pixels
rcParams |= {"axes.titlesize": 8.6, "axes.titlelocation": "left", "text.parse_math": False}
rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlepad": 4}
rcParams |= {"figure.constrained_layout.use": True, "figure.constrained_layout.w_pad": 0.08}
rcParams["figure.constrained_layout.h_pad"] = 0.06


def save(figure: Figure, file: Path) -> None:
    """Write a picture with few colours: a small file, the same bytes every time."""
    figure.savefig(file, metadata={"Software": None})
    Image.open(file).convert("RGB").quantize(255).save(file, optimize=True)


def head(figure: Figure, finding: str, note: str = "") -> None:
    """Write the finding above a figure and a note below it."""
    figure.suptitle(finding, x=0.01, ha="left")
    figure.supxlabel(note, x=0.01, ha="left", fontsize=rcParams["font.size"])


def result() -> None:
    """Draw accuracy untrained, one-shot and trained: three sizes side by side."""
    figure = Figure((8, 3.6))
    for ax, (name, columns) in zip(figure.subplots(1, 3), MODELS.items(), strict=True):
        measured = [run.evaluation["measurements"] for run in runs(columns)]
        bars = [(when, kind) for when in MEASURED for kind in ACCURACY]
        for i, (when, kind) in enumerate(bars):
            found = [each[when][f"{kind}_accuracy"] for each in measured]
            found = found if when == AFTER else found[:1]  # one untrained model for all seeds
            x, mean = i // 2 + 0.4 * (i % 2), 100 * tables.mean_value(found)
            ax.bar(x, mean, 0.38, color=ACCURACY[kind], alpha=0.8, label=kind)
            for j, cell in enumerate(found):
                at, y = x + 0.05 * (2 * j + 1 - len(found)), ("low", "value", "high")
                style = {"color": INK, "lw": 1.3, "ms": 3.2, "markevery": [1]}
                ax.plot([at] * 3, [100 * cell[key] for key in y], "-o", **style)
            top = (x, 100 * max(cell["high"] for cell in found))
            ax.annotate(f"{mean:.1f}", top, (0, 3), textcoords="offset points", ha="center")
        ax.set_xticks([0.2, 1.2, 2.2], ["untrained", "one-shot", "trained"], fontweight="bold")
        ax.tick_params("x", length=0)
        title = name if len(columns) == 1 else "Laptop model"
        ax.set_title(f"{title}: % right of {found[0]['n']}", pad=14)
    note = (
        "Lenient: the last number is right. Strict: the right number is inside the tags. One-shot: "
        "untrained, one example\nin the prompt. Dots and lines: each run and its 95% interval. "
        f"Laptop, trained: {len(LAPTOP)} seeds, the bars are means. The axes differ."
    )
    figure.legend(*(row[:2] for row in ax.get_legend_handles_labels()), ncols=2, frameon=False)
    head(figure, "Format learned, reasoning not improved", note)
    save(figure, PICTURES / "result.png")


def draw_curve(ax, values: list[float], color: str) -> None:
    """Draw the mean of each step as a thin line and that of the last five steps as a bold one."""
    steps = range(1, len(values) + 1)
    fives = [values[max(0, step - 5) : step] for step in steps]
    ax.plot(steps, values, color=color, alpha=0.35, lw=0.8)
    ax.plot(steps, [sum(five) / len(five) for five in fives], color=color, lw=1.8)


def draw_rewards(figure: Figure, metrics: list[dict]) -> None:
    """Draw the sum of the rewards and each reward, over the steps, with the maximum of each."""
    keys = ["reward", *(f"rewards/{reward}/mean" for reward in REWARDS)]
    panels = zip(keys, ["sum", *NAMES], [INK, *COLORS], [sum(MOST), *MOST], strict=True)
    for ax, (key, name, color, most) in zip(figure.subplots(2, 3, sharex=True).flat, panels):  # noqa: B905
        values = [m[key] for m in metrics]
        draw_curve(ax, values, color)
        ax.axhline(most, color=INK, lw=0.9, ls=":")
        ax.set_ylim(min(0, *values) * 1.1, most * 1.08)
        ax.set_title(f"{name}, at most {most:g}", color=color)


def p1(file: Path, metrics: list[dict], timers: dict[str, list[float]]) -> None:
    """Draw the timers of a run, under their names in W&B, and its rewards."""
    figure, steps = Figure((8, 7.4)), len(metrics)
    upper, lower = figure.subfigures(2, 1)
    names = [next(name for name in timers if "generate" in name), *REWARDS]
    axes = upper.subplots(2, 3, sharex=True).flat
    for ax, name, color in zip(axes, names, [TIMER, *COLORS], strict=True):
        calls = len(timers[name]) // steps
        each = [sum(timers[name][i * calls : (i + 1) * calls]) for i in range(steps)]
        unit, factor = ("seconds", 1) if max(each) > 0.1 else ("milliseconds", 1000)
        ax.plot(range(1, steps + 1), [factor * t for t in each], color=color, lw=1.2)
        ax.set(ylim=(0, None), ylabel=unit)
        ax.set_title(name, color=color)
    parts = time_split(metrics, timers)
    generate, five = (parts[part] / sum(parts.values()) for part in ("generate", "five rewards"))
    head(upper, f"Generation takes {generate:.0%} of a step, the five rewards {five:.2%}")
    draw_rewards(lower, metrics)
    ten, sums = min(10, steps), [m["reward"] for m in metrics]
    first, last = (f"{sum(end) / ten:.1f}" for end in (sums[:ten], sums[-ten:]))
    finding = f"The sum of the rewards goes from {first} to {last}, of {sum(MOST):g}"
    head(lower, f"{finding} (first and last {ten} steps)", LINES)
    save(figure, file)


def card(file: str, sample: dict, title: str, marks: list[str], why: list[str]) -> None:
    """Draw a completion with its question, answers, rewards and why; highlight the lines of marks.

    Of long completions the middle is left out.
    """
    values, text = [sample[reward] for reward in REWARDS], sample["completion"]
    lines = [x for part in text.replace("\n", "↵\n").split("\n") for x in textwrap.wrap(part, 110)]
    if len(lines) > 14:
        lines[3:-5] = [f"[... {len(lines) - 8} lines left out ...]"]
    question = f"Step {sample['step']}. Question: {sample['question']}"
    rows = [(title, {"size": 11.5, "weight": "bold"})]
    rows += [(line, {"style": "italic"}) for line in textwrap.wrap(question, 124)]
    for line in lines:
        marked = any(mark in line for mark in marks)
        back = {"boxstyle": "square,pad=0.1", "lw": 0, "fc": MARK if marked else "white"}
        rows.append((line, {"family": "monospace", "bbox": back}))
    rows.append((f"Gold answer: {sample['gold']}.  Extracted: {sample['extracted']}.", {}))
    reasons = [*why, f"advantage in its group: {sample['advantage']:+.3f}"]
    parts = ([*NAMES, "sum"], [*values, sum(values)], [*COLORS, INK], reasons)
    for name, value, color, reason in zip(*parts, strict=True):
        cells = f"{name:<20}{value:>+7.3f}   {reason}"
        rows.append((cells, {"family": "monospace", "color": color}))
    figure = Figure((8, 0.2 * len(rows) + 0.15))
    for i, (row, style) in enumerate(rows, 1):
        figure.text(0.012, 1 - i * 0.2 / figure.get_figheight(), row, **style)
    save(figure, PICTURES / file)


def cards(samples: list[dict]) -> None:
    """Draw a wrong completion of the last steps with the full format, a failure of the first."""
    perfect = [s for s in samples[10:] if s["strict_format_reward_func"] and not s[REWARDS[-1]]]
    shallow = min(perfect, key=lambda s: len(s["completion"]))
    answers = ["all digits or nothing, right or wrong", "0: not the gold answer"]
    why = ["each tag once, a newline at the end", "two blocks", "each tag on its line", *answers]
    marks = textwrap.wrap(shallow["completion"].split("\n")[1], 110)
    title = "Perfect XML around false reasoning earns half of the reward"
    card("p2.png", shallow, title, marks, why)
    ended = [s for s in samples[:10] if s["completion"].endswith("</answer>")]
    why = ["no newline ends it: all of its text is penalized", *["never closed"] * 2, *answers]
    title = "An early failure: wrong, never closed, and penalized for its whole length"
    marks = ["<reasoning>", "</answer>"]
    card("p3.png", min(ended, key=lambda s: s[REWARDS[0]]), title, marks, why)


def p4() -> None:
    """Draw the rewards of the 1.5B Qwen, its accuracies and what follows its answers."""
    (run,), figure = runs(QWEN), Figure((8, 6.0))
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.6, 1])
    draw_rewards(upper, run.metrics)
    left, right = lower.subplots(1, 2, sharey=True)
    ends = tables.read(QWEN["seed 42"], "endings")
    steps = [Counter(ends[f"step {step}"]) for step in range(1, len(run.metrics) + 1)]
    newline = [step["\n"] / step.total() for step in steps]
    other = [1 - (step["\n"] + step[""] + step["none"]) / step.total() for step in steps]
    strict, lenient = (
        [m[f"accuracy/{kind}"] for m in run.metrics] for kind in ("strict", "lenient")
    )
    for ax, name, shares, color, y in (
        (left, "lenient", lenient, ACCURACY["lenient"], 90),
        (left, "strict", strict, ACCURACY["strict"], 78),
        (right, "only a newline", newline, INK, 90),
        (right, "other text", other, TAIL, 76),
    ):
        draw_curve(ax, [100 * share for share in shares], color)
        ax.text(1, y, name, color=color)
    left.set_title("right answers, % of completions")
    right.set(title="what follows the last </answer>, % of completions", ylim=(0, 105))
    head(upper, "The full format after 14 steps, by way of stray text that xmlcount pays for")
    head(lower, "", LINES)
    save(figure, PICTURES / "p4.png")


def main() -> None:
    """Draw README's pictures; or, with an output directory, the timers and rewards of that run."""
    parser = command_line(__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="output directory of a run of your own")
    if out := parser.parse_args().out:
        log = collect(out)
        if len(log.metrics) < 2:
            parser.error(f"{out} has no W&B files with two steps or more")
        p1(out / "p1.png", log.metrics, log.timers)
        return print(out / "p1.png")
    p1(PICTURES / "p1.png", runs(LAPTOP)[0].metrics, tables.read(LAPTOP["seed 42"], "timers"))
    cards(tables.read(QWEN["seed 42"], "samples"))
    result()
    p4()


if __name__ == "__main__":
    main()
