"""Write README's tables from the records in assets/runs and from assets/benchmark.md.

python assets/tables.py
"""

import json
import statistics
import sys
import textwrap
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from rewards import EXAMPLES, REWARD_FUNCS  # noqa: E402

# title of the column: folder in assets/runs
LAPTOP = {f"seed {seed}": f"laptop-{seed}" for seed in (42, 1, 2)}
QWEN = {"seed 42": "qwen-half-b"}
PASSED = {t: name for t, name in LAPTOP.items() if (HERE / f"runs/pass/{name}.json").exists()}
# a closing tag after the answer, in endings.json
STRAY = ["\n</reasoning>", "\n</reasoning> (the only one)"]
MEASURED = {
    "before_zero_shot": "before",
    "before_one_shot": "before (one-shot)",
    "after_zero_shot": "after",
}
REWARDS = ["xmlcount", "soft", "strict", "int", "correct"]


def runs(columns: dict[str, str]) -> list[tuple[dict, list[dict], dict]]:
    """Return evaluation, metrics of each step and record of each column's run."""
    folders = [HERE / "runs" / name for name in columns.values()]
    return [
        (
            json.loads((f / "evaluation.json").read_text()),
            [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()],
            json.loads((f / "record.json").read_text()),
        )
        for f in folders
    ]


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def interval(figure: dict, form: str = "{:.1%} [{:.1%}, {:.1%}]") -> str:
    return form.format(figure["value"], *figure["interval"])


def results() -> str:
    """Return the evaluation of the laptop run at three seeds, with 95% intervals."""
    evaluations, rows = [e for e, _, _ in runs(LAPTOP)], []
    for what in ("strict_format", "strict_accuracy", "lenient_accuracy"):
        for when, title in MEASURED.items():
            figures = [e["measurements"][when][what] for e in evaluations]
            rows.append([f"{what.replace('_', ' ')}, {title}", *map(interval, figures)])
    named = {"strict_accuracy": "gain in strict accuracy, points", "reasoning": "due to reasoning"}
    for key, row in named.items():
        gains = [[100 * x for x in e["gain"][key]] for e in evaluations]
        rows.append([row, *("{:+.1f} [{:+.1f}, {:+.1f}]".format(*g) for g in gains)])
    rows.append(["due to format", *(f"{100 * e['gain']['format']:+.1f}" for e in evaluations)])
    rows.append(["**verdict**", *(f"**{e['verdict']}**" for e in evaluations)])
    return table(["laptop run, 512 test questions", *LAPTOP], rows)


def ten_step_means(metrics: list[dict], key: str) -> list[float]:
    """Return the means of all ten consecutive steps of a run."""
    return [sum(m[key] for m in metrics[i - 10 : i]) / 10 for i in range(10, len(metrics) + 1)]


COURSE = [  # title, metric, format
    ("soft format reward, at most 0.5", "rewards/soft_format_reward_func/mean", "{:.3f}"),
    ("strict format reward, at most 0.5", "rewards/strict_format_reward_func/mean", "{:.3f}"),
    (
        "its standard deviation: first, widest and last ten steps",
        "rewards/strict_format_reward_func/std",
        "{:.3f}",
    ),
    ("xmlcount reward, at most 0.5", "rewards/xmlcount_reward_func/mean", "{:.3f}"),
    ("correctness reward, at most 2", "rewards/simple_correctness_reward_func/mean", "{:.3f}"),
    ("groups in which all rewards are equal", "frac_reward_zero_std", "{:.0%}"),
    ("tokens a completion", "completions/mean_length", "{:.1f}"),
    ("KL to the untrained model", "kl", "{:.3f}"),
]


def course(
    columns: dict[str, str] = LAPTOP, title: str = "laptop run, first and last ten steps"
) -> str:
    """Return what changes during a run: means of the first and of the last ten steps."""
    rows = []
    for row, key, form in COURSE:
        cells = []
        for _, metrics, _ in runs(columns):
            tens = ten_step_means(metrics, key)
            picked = [tens[0], *([max(tens)] if "widest" in row else []), tens[-1]]
            cells.append(", ".join(map(form.format, picked)))
        rows.append([row, *cells])
    seconds = [f"{record['seconds']:.0f}" for _, _, record in runs(columns)]
    rows.append(["seconds from the first step to the verdict", *seconds])
    return table([title, *columns], rows)


def pass_at_k(model: str, prompt: str, kind: str) -> dict[int, dict]:
    """Return k -> value, n and interval of a model of assets/runs/pass."""
    record = json.loads((HERE / "runs/pass" / f"{model}.json").read_text())
    return {int(k): cell for k, cell in record["pass"][prompt][f"{kind}_accuracy"].items()}


def passed() -> str:
    """Return pass@k of the laptop model: untrained with both prompts, trained at three seeds."""
    columns = {
        "untrained, lenient": pass_at_k("untrained", "zero_shot", "lenient"),
        "untrained, one-shot, strict": pass_at_k("untrained", "one_shot", "strict"),
    }
    for title, name in PASSED.items():
        columns[f"trained, {title}, strict"] = pass_at_k(name, "zero_shot", "strict")
    ks = list(next(iter(columns.values())))
    rows = [[k, *(interval(cells[k]) for cells in columns.values())] for k in ks]
    text = table(["k", *columns], rows)
    _, shot, *trained = columns.values()
    one = sum(cells[1]["value"] for cells in trained) / len(trained)
    enough = next((k for k in ks if shot[k]["value"] >= one), None)
    last = sum(cells[ks[-1]]["value"] for cells in trained) / len(trained)
    times = f"{enough} sample{'s' if enough != 1 else ''}" if enough else f"over {ks[-1]} samples"
    said = (
        f"With one sample the trained models answer {one:.1%} right (mean of the seeds); the "
        f"untrained model with one example reaches that with {times}. "
        f"With {ks[-1]} samples the trained models reach "
        f"{last:.1%}, the untrained one {shot[ks[-1]]['value']:.1%}."
    )
    return text + "\n" + "\n".join(textwrap.wrap(said, 120)) + "\n"


def tails(name: str) -> str:
    """Return how the completions of a run end, from its endings.json."""
    ends = json.loads((HERE / "runs" / name / "endings.json").read_text())
    steps = [key for key in ends if key.startswith("step ")]
    columns = {title: [when] for when, title in MEASURED.items()}
    columns |= {"steps 1 to 10": steps[:10], "last ten steps": steps[-10:]}
    counts = [sum((Counter(ends[key]) for key in keys), Counter()) for keys in columns.values()]
    named = {tail for count in counts for tail in count} - {"other", "none"}
    words = {"": "nothing", "other": "anything else", "none": "there is no `</answer>`"}
    words |= {STRAY[0]: f"{code(STRAY[0])}, a second one"}
    words |= {STRAY[1]: f"{code(STRAY[0])}, the only one"}
    rows = [
        [words.get(tail, code(tail)), *(f"{count[tail] / count.total():.1%}" for count in counts)]
        for tail in [*sorted(named, key=lambda tail: (len(tail), tail)), "other", "none"]
    ]
    return table(["what follows the last `</answer>`", *columns], rows)


def qwen() -> str:
    """Return the run of a real Qwen2.5: evaluation, rewards, how its completions end."""
    ((evaluation, _, _),), (name,) = runs(QWEN), QWEN.values()
    measured = [evaluation["measurements"][when] for when in MEASURED]
    rows = []
    for what in (
        "soft_format",
        "strict_format",
        "strict_accuracy",
        "lenient_accuracy",
        "truncated",
    ):
        rows.append([what.replace("_", " "), *(interval(figures[what]) for figures in measured)])
    tokens = [interval(figures["tokens"], "{:.0f} [{:.0f}, {:.0f}]") for figures in measured]
    first = table(["200 test questions", *MEASURED.values()], [*rows, ["tokens", *tokens]])
    said = " ".join([f"Verdict: **{evaluation['verdict']}**.", *evaluation["sentences"]])
    middle = course(QWEN, "first and last ten steps")
    return "\n".join([first, *textwrap.wrap(said, 120), "", middle, tails(name)])


def reliability() -> str:
    """Return what tests/test_nothing_lost.py and tests/test_rewards.py tried.

    RELIABILITY=assets/runs/reliability.jsonl python -m pytest \\
        tests/test_nothing_lost.py tests/test_rewards.py
    """
    lines = (HERE / "runs" / "reliability.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return table(["fault", "tried", "recovered", "steps missing in the end"], rows)


def code(text: str) -> str:
    return "`" + text.replace("\n", "\\n") + "`"


def examples() -> str:
    """Return the five rewards by example, as `python rewards.py` prints them."""
    rows = []
    for _, text, why in EXAMPLES:
        got = [f(completions=[[{"content": text}]], answer=["18"])[0] for f in REWARD_FUNCS]
        rows.append([code(text), *(f"{reward:.3f}" for reward in got), f"**{sum(got):.3f}**", why])
    return table(["completion; the gold answer is 18", *REWARDS, "sum", "why"], rows)


def group() -> str:
    """Return a group of the run on record: its rewards and advantages."""
    group = json.loads((HERE / "runs" / "laptop-42" / "group.json").read_text())
    got = [[row[f.__name__] for f in REWARD_FUNCS] for row in group]
    mean, std = statistics.mean(map(sum, got)), statistics.stdev(map(sum, got))
    rows = []
    for row, rewards in zip(group, got, strict=True):
        cells = [f"{reward:.3f}" for reward in [*rewards, sum(rewards)]]
        advantage = (sum(rewards) - mean) / (std + 1e-4)
        rows.append([code(row["completion"]), *cells, f"{advantage:+.3f}"])
    text = f"Step {group[0]['step']}, *{group[0]['question']}* The gold answer is "
    text += f"{group[0]['gold']}; the rewards have a mean of {mean:.3f} and a standard deviation "
    text += f"of {std:.3f}.\n\n"
    titles = [f"its {len(group)} completions", *REWARDS, "reward", "advantage"]
    return text + table(titles, rows)


def lines(name: str) -> dict[str, list[dict]]:
    """Return the runs of assets/experiments.py, by what was changed."""
    changes: dict[str, list[dict]] = {}
    for row in map(json.loads, (HERE / "runs" / f"{name}.jsonl").read_text().splitlines()):
        changes.setdefault(row["change"], []).append(row)
    return changes


def spread(values: list[float], form: str = "{:.1%}") -> str:
    """Return the mean over seeds, and the smallest and the largest."""
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(sum(values) / len(values)) + (f" ({low} to {high})" if low != high else "")


def at_the_end(row: dict, key: str = "rewards/strict_format_reward_func/mean") -> float:
    """Return the mean of a curve's last ten steps."""
    return sum(row["curve"][key][-10:]) / 10


def steps_until_format(row: dict) -> int:
    """Return the first step at which half of the last five steps' samples were strict; else 61."""
    curve = row["curve"]["rewards/strict_format_reward_func/mean"]
    return next((i for i in range(5, 61) if sum(curve[i - 5 : i]) >= 5 * 0.25), 61)


def settings() -> str:
    """Return how the laptop's learning rate was chosen: other seeds, validation questions."""
    rows = []
    for change, runs in lines("settings").items():
        accuracy = [
            [run["measured"][when]["lenient_accuracy"] for run in runs]
            for when in ("before_zero_shot", "after_zero_shot")
        ]
        reward = spread([at_the_end(run) for run in runs], "{:.3f}")
        rows.append([change.removeprefix("learning rate "), reward, *map(spread, accuracy)])
    titles = ["learning rate", "strict format reward, last ten steps"]
    return table([*titles, "lenient accuracy before", "after"], rows)


def parts() -> str:
    """Return what each part of the recipe does: the laptop run with one thing changed."""
    rows = []
    for change, runs in lines("parts").items():
        after = [run["measured"]["after_zero_shot"] for run in runs]
        columns = ("strict_format", "strict_accuracy", "lenient_accuracy")
        cells = [spread([measured[column] for measured in after]) for column in columns]
        steps = [steps_until_format(run) for run in runs]
        each = ", ".join("never" if step == 61 else str(step) for step in steps)
        cells.append(spread(steps, "{:.0f}") if max(steps) < 61 else each)
        cells.append(spread([2 * at_the_end(run) for run in runs], "{:.0%}"))
        kl = spread([at_the_end(run, "kl") for run in runs], "{:.2f}")
        measured = any(any(run["curve"]["kl"]) for run in runs)
        rows.append([change, *cells, kl if measured else "not measured"])
    titles = ["changed", "strict format", "strict accuracy", "lenient accuracy"]
    titles += ["steps until format", "sampled strict XML, last ten steps", "KL"]
    return table(titles, rows)


def updates() -> str:
    """Return what bf16 does to small updates: six steps, and how far the weights have moved."""
    rows = []
    for change, runs in lines("updates").items():
        changed = spread([run["moved"]["changed"] for run in runs])
        distance = spread([run["moved"]["distance"] for run in runs], "{:.1e}")
        rows.append([change, changed, distance])
    titles = ["weights and Adam's state in", "weights that changed", "distance moved, relative"]
    return table(titles, rows)


def benchmark() -> str:
    """Return what assets/benchmark.md says: sentences, the time split, the GPU table if any."""
    parts = (HERE / "benchmark.md").read_text().split("### ")[1:]
    pairs, split, rewards, *gpu = [part.split("\n\n")[1].strip() for part in parts]
    ratios = [line.strip(" |").split(" | ")[-1] for line in pairs.splitlines()[2:]]
    hour = split.splitlines()[-1].strip(" |").split(" | ")
    took = [line.strip(" |").split(" | ")[-1] for line in rewards.splitlines()[2:]]
    text = (
        f"A step of the script takes {ratios[-1]} times as long as one of a bare GRPOTrainer with "
        f"the gist's rewards (median of {len(ratios) - 1} pairs of runs, {min(ratios[:-1])} to "
        f"{max(ratios[:-1])}). An hour holds {hour[1]} steps; with the gist's four generate calls "
        f"of 16 it holds {hour[2]}. The five rewards take {took[0]} for 64 completions of 1,000 "
        f"characters, the gist's own functions {took[1]}, the accuracy logging {took[2]} more."
    )
    return "\n\n".join(["\n".join(textwrap.wrap(text, 100)), split, *gpu]) + "\n"


TABLES = [results, passed, examples, group, course, qwen]
TABLES += [settings, parts, updates, benchmark, reliability]


def main() -> None:
    """Write all tables into README.md."""
    path = HERE.parent / "README.md"
    text = path.read_text()
    for make in TABLES:
        start, end = f"<!-- {make.__name__} -->\n", f"<!-- /{make.__name__} -->"
        before, _, rest = text.partition(start)
        text = before + start + make() + end + rest.partition(end)[2]
    path.write_text(text)


if __name__ == "__main__":
    main()
