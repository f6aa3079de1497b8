"""Draw README's pictures from the records in runs/, or one picture of a run of your own.

pip install matplotlib==3.11.2
python -m assets.research.figures                  # README's pictures
python -m assets.research.figures outputs/tiny     # timers and rewards: outputs/tiny/p1.png
"""

import argparse
import sys
import textwrap
from pathlib import Path

try:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from PIL import Image
except ModuleNotFoundError:
    print("pictures need matplotlib: pip install matplotlib==3.11.2", file=sys.stderr)
    sys.exit(2)

from assets.research import tables
from assets.research.record import collect, time_split
from assets.research.tables import AFTER, BEFORE, HALF, LAPTOP, MEASURED, QWEN, ROOT, SHOT, runs
from rewards import EXAMPLES, REWARD_FUNCS

ASSETS = ROOT / "assets"
PICTURES = ASSETS / "pictures"
REWARDS = [reward.__name__ for reward in REWARD_FUNCS]
NAMES = [reward.removesuffix("_reward_func") for reward in REWARDS]
PERFECT = {"completions": [[{"content": EXAMPLES[0][1]}]], "answer": ["18"]}
MOST = [reward(**PERFECT)[0] for reward in REWARD_FUNCS]  # what a perfect completion earns
COLORS = ["#128c8c", "#e07b16", "#2a962a", "#8e5fbc", "#8c564b"]  # of the rewards
ACCURACY = {"lenient": "#1f6fb4", "strict": "#d62728"}
INK, MARK, TAIL = "#333a42", "#f3f58c", "#8f9600"
SIZES = {"Laptop model": LAPTOP, "Qwen2.5 0.5B": HALF, "Qwen2.5 1.5B": QWEN}
PARTS = ["#5b6b7f", INK, "#aeb8c3", "#8d9bab", INK, "#c3cbd3", "#dde2e7"]  # of a step
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
    above = {"textcoords": "offset points", "ha": "center"}
    for ax, (name, columns) in zip(figure.subplots(1, 3), SIZES.items(), strict=True):
        measured = [run.evaluation["measurements"] for run in runs(columns)]
        bars = [(when, kind) for when in MEASURED for kind in ACCURACY]
        for i, (when, kind) in enumerate(bars):
            found = [measurements[when][f"{kind}_accuracy"] for measurements in measured]
            if when != AFTER:
                found = found[:1]  # one untrained model for all seeds
            x = i // 2 + 0.4 * (i % 2)
            mean = tables.mean_value(found)
            ax.bar(x, 100 * mean, 0.38, color=ACCURACY[kind], alpha=0.8, label=kind)
            for j, cell in enumerate(found):
                at = x + 0.05 * (2 * j + 1 - len(found))
                y = [100 * cell[key] for key in ("low", "value", "high")]
                ax.plot([at] * 3, y, "-o", color=INK, lw=1.3, ms=3.2, markevery=[1])
            top = 100 * max(cell["high"] for cell in found)
            ax.annotate(f"{100 * mean:.1f}", (x, top), (0, 3), **above)
        ax.set_xticks([0.2, 1.2, 2.2], ["untrained", "one-shot", "trained"], fontweight="bold")
        ax.tick_params("x", length=0)
        ax.set_title(f"{name}: % right of {found[0]['n']}", pad=14)
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
    panels = [("reward", "sum", INK, sum(MOST))]
    for reward, name, color, most in zip(REWARDS, NAMES, COLORS, MOST, strict=True):
        panels.append((f"rewards/{reward}/mean", name, color, most))
    axes = figure.subplots(2, 3, sharex=True).flat
    for ax, (key, name, color, most) in zip(axes, panels, strict=True):
        values = [m[key] for m in metrics]
        draw_curve(ax, values, color)
        ax.axhline(most, color=INK, lw=0.9, ls=":")
        ax.set_ylim(min(0, *values) * 1.1, most * 1.08)
        ax.set_title(f"{name}, at most {most:g}", color=color)


def p1(file: Path, metrics: list[dict], timers: dict[str, list[float]]) -> None:
    """Draw the timers of a run, under their names in W&B, and its rewards."""
    steps = len(metrics)
    figure = Figure((8, 7.4))
    upper, lower = figure.subfigures(2, 1)
    names = [next(name for name in timers if "generate" in name), *REWARDS]
    axes = upper.subplots(2, 3, sharex=True).flat
    for ax, name, color in zip(axes, names, [PARTS[0], *COLORS], strict=True):
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
    ten = min(10, steps)
    sums = [m["reward"] for m in metrics]
    first, last = (f"{sum(end) / ten:.1f}" for end in (sums[:ten], sums[-ten:]))
    finding = f"The sum of the rewards goes from {first} to {last}, of {sum(MOST):g}"
    head(lower, f"{finding} (first and last {ten} steps)", LINES)
    save(figure, file)


def wrap(text: str, marks: dict[int, tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Return the lines of a completion, each with its highlight and note; elide the middle.

    marks  number of a paragraph, from the start or the end: the text to highlight, a note
    """
    lines = []
    paragraphs = text.split("\n")
    for i, paragraph in enumerate(paragraphs, -len(paragraphs)):
        mark, note = marks.get(i) or marks.get(i + len(paragraphs)) or ("", "")
        over = " " * paragraph.index(mark) + "█" * len(mark)
        for line in textwrap.wrap(paragraph + "↵" * (i < -1), 110):
            lines.append((line, over[: len(line)], note))
            over = over[len(line) + 1 :]  # without the space at which the line was broken
    if len(lines) > 14:
        lines[3:-5] = [(f"[... {len(lines) - 8} lines left out ...]", "", "")]
    return lines


def explain(sample: dict, why: str, soft: str, strict: str) -> list[str]:
    """Return the reason for each of the five rewards of a completion, and for their sum."""
    values = [sample[reward] for reward in REWARDS]
    got = sample["extracted"]
    tags = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    earned = MOST[0] * sum(sample["completion"].count(tag) == 1 for tag in tags) / len(tags)
    way = "more" if sample["advantage"] > 0 else "less"
    return [
        f"tags earn {earned:.3f}, minus {earned - values[0]:.3f} {why}",
        soft,
        strict,
        f"{got} is {'' if values[3] else 'not '}all digits, whether right or wrong",
        f"{got} is {'' if values[4] else 'not '}the gold answer",
        f"advantage in its group {sample['advantage']:+.3f}: made {way} likely",
    ]


def card(file: str, title: str, sample: dict, marks: dict, reasons: list[str]) -> None:
    """Draw a completion of samples.json, its answer, its rewards and the reason for each."""
    italic, mono = {"style": "italic"}, {"family": "monospace"}
    rows = [(0.28, [(0.1, title, {"size": 11.5, "weight": "bold"})])]  # inches down, its texts
    question = f"Step {sample['step']}. Question: {sample['question']}"
    rows += [(0.19, [(0.1, line, italic)]) for line in textwrap.wrap(question, 124)] + [(0.12, [])]
    for line, highlight, note in wrap(sample["completion"], marks):
        texts = [(0.1, highlight, mono | {"color": MARK}), (0.1, line, mono), (1.5, note, italic)]
        rows.append((0.18, texts))
    answer = f"Gold answer: {sample['gold']}.  Extracted answer: {sample['extracted']}."
    rows.append((0.32, [(0.1, answer, {})]))
    values = [sample[reward] for reward in REWARDS]
    table = ([*NAMES, "sum"], [*values, sum(values)], [*COLORS, INK], reasons)
    for name, value, color, reason in zip(*table, strict=True):
        number = (2.1, f"{value:+.3f}" if value else "0", {"ha": "right"})
        name = (0.1, name, {"color": color, "weight": "bold"})
        rows.append((0.205, [name, number, (2.25, reason, {})]))
    height = sum(down for down, _ in rows) + 0.14
    y = 0.0
    figure = Figure((8, height))
    for down, texts in rows:
        y += down
        for x, text, style in texts:
            figure.text(x / 8, 1 - y / height, text, **style)
    save(figure, ASSETS / file)


def p2(samples: list[dict]) -> None:
    """Draw a wrong completion of the last steps that has the full format."""
    perfect = [s for s in samples[10:] if s["strict_format_reward_func"]]
    shallow = min([s for s in perfect if not s[REWARDS[-1]]], key=lambda s: len(s["completion"]))
    why = "as only a newline follows </answer>"
    soft = "a reasoning block, then an answer block"
    reasons = explain(shallow, why, soft, "every tag on its own line")
    title = "Perfect XML around false reasoning earns half of the reward"
    card("p2.png", title, shallow, {1: (shallow["completion"].split("\n")[1], "")}, reasons)


def p3(samples: list[dict]) -> None:
    """Draw a failure of the first steps."""
    ended = [s for s in samples[:10] if s["completion"].endswith("</answer>")]
    failure = min(ended, key=lambda s: s[REWARDS[0]])
    marks = {0: ("<reasoning>", "never closed"), -1: ("</answer>", "no newline after it")}
    why = "for the whole text, as no newline ends it"
    reasons = explain(failure, why, *["<reasoning> is never closed"] * 2)
    title = "An early failure: wrong, never closed, and penalized for its whole length"
    card("p3.png", title, failure, marks, reasons)


def stray(ends: dict[str, int]) -> int:
    """Return how many completions have text after their last `</answer>`."""
    return sum(n for tail, n in ends.items() if tail not in ("", "\n", "none"))


def p4() -> None:
    """Draw the rewards of the 1.5B Qwen, its accuracies and what follows its answers."""
    metrics = runs(QWEN)[0].metrics
    figure = Figure((8, 6.0))
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.6, 1])
    draw_rewards(upper, metrics)
    left, right = lower.subplots(1, 2, sharey=True)
    for (kind, color), y in zip(ACCURACY.items(), (90, 78), strict=True):
        draw_curve(left, [100 * m[f"accuracy/{kind}"] for m in metrics], color)
        left.text(1, y, kind, color=color)
    left.set_title("right answers, % of completions")
    ends = tables.read(QWEN["seed 42"], "endings")
    steps = [ends[f"step {step}"] for step in range(1, len(metrics) + 1)]
    for name, color, y in (("only a newline", INK, 90), ("other text", TAIL, 76)):
        counts = [step.get("\n", 0) if color == INK else stray(step) for step in steps]
        pairs = zip(counts, steps, strict=True)
        draw_curve(right, [100 * n / sum(step.values()) for n, step in pairs], color)
        right.text(1, y, name, color=color)
    right.set(title="what follows the last </answer>, % of completions", ylim=(0, 105))
    head(upper, "The full format after 14 steps, by way of stray text that xmlcount pays for")
    head(lower, "", LINES)
    save(figure, PICTURES / "p4.png")


def time() -> None:
    """Draw how the time of a step splits, as one bar for each run."""
    figure = Figure((8, 4.0))
    most = 0.0
    for ax, (name, columns) in zip(figure.subplots(3, 1), SIZES.items(), strict=True):
        run = runs(columns)[0]
        parts = time_split(run.metrics, tables.read(columns["seed 42"], "timers"))
        whole = sum(parts.values())
        left = 0.0
        small = []
        most = max(most, parts["five rewards"] / whole)
        for (part, seconds), color in zip(parts.items(), PARTS, strict=True):
            share = seconds / whole
            ax.barh(0, share, left=left, color=color, edgecolor="white", lw=1.5)
            if share < 0.01:
                small.append(f"{part} {100 * share:.2g}%")
            else:
                dark = "white" if part == "generate" else INK
                ax.text(left + share / 2, 0, f"{share:.0%}", color=dark, ha="center", va="center")
                ax.text(left + share / 2, 0.5, part.replace(" ", "\n", 1), ha="center")
            left += share
        ax.text(0, -0.5, "Too small to see: " + ", ".join(small), va="top")
        ax.set(xlim=(0, 1), ylim=(-0.4, 1.1))
        ax.axis("off")
        cores = run.record["hardware"]["cores"]
        ax.set_title(f"{name}: {whole:.3g} s a step on {cores} cores", fontweight="bold")
    head(figure, f"The five rewards take {most:.2%} of a step at most")
    save(figure, PICTURES / "time.png")


def passed() -> None:
    """Draw lenient pass@k of the three measurements: a line a run, of a single one intervals."""
    models = {"Laptop model: % of 512": LAPTOP, "Qwen2.5 1.5B: % of 48": QWEN}
    looks = {BEFORE: ":", SHOT: "--", AFTER: "-"}
    figure = Figure((8, 3.5))
    for ax, (name, columns) in zip(figure.subplots(1, 2), models.items(), strict=True):
        single = len(columns) == 1
        for j, when in enumerate(runs(columns)[0].evaluation["pass"]):
            cells = tables.pass_at_k(columns, when, "lenient")
            color = ACCURACY["lenient"] if when == AFTER else INK
            style = {"marker": "o", "color": color, "ms": 3, "lw": 1.4}
            at = [x + 0.08 * (j - 1) * single for x in range(len(cells))]
            for i, curve in enumerate(zip(*cells.values(), strict=True)):
                shares = [100 * cell["value"] for cell in curve]
                ax.plot(at, shares, looks[when], label=None if i else MEASURED[when], **style)
                if single:  # no seeds to show the spread
                    lows, highs = ([100 * cell[end] for cell in curve] for end in ("low", "high"))
                    ax.vlines(at, lows, highs, color=color, lw=0.8)
        ax.set_xticks(range(len(cells)), [f"k = {k}" for k in cells])
        ax.set_title(f"{name} test questions")
        ax.legend(frameon=False, loc="upper left")
    note = (
        "One of k sampled answers is right in any form (lenient). The axes differ, and do not "
        f"begin at 0.\nLeft: a line for each of {len(LAPTOP)} seeds. "
        "Right: one run with 95% intervals."
    )
    head(figure, "With many samples the untrained models find as many answers, or more", note)
    save(figure, PICTURES / "pass.png")


def main() -> None:
    """Draw README's pictures; or, with an output directory, the timers and rewards of that run."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=Path, nargs="?", help="output directory of a run of your own")
    if out := parser.parse_args().out:
        log = collect(out)
        if len(log.metrics) < 2:
            parser.error(f"{out} has no W&B files with two steps or more")
        p1(out / "p1.png", log.metrics, log.timers)
        return print(out / "p1.png")
    result()
    p1(ASSETS / "p1.png", runs(LAPTOP)[0].metrics, tables.read(LAPTOP["seed 42"], "timers"))
    p2(tables.read(QWEN["seed 42"], "samples"))
    p3(tables.read(QWEN["seed 42"], "samples"))
    p4()
    passed()
    time()


if __name__ == "__main__":
    main()
