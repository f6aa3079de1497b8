"""README's tables, from the records in assets/runs and from assets/benchmark.md.

python assets/tables.py        # writes them into README.md
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

LAPTOP = {f"seed {seed}": f"laptop-{seed}" for seed in (42, 1, 2)}  # title of the column, folder in assets/runs
QWEN = {"seed 42": "qwen-half-b"}
STRAY = ["\n</reasoning>", "\n</reasoning> (the only one)"]  # a closing tag after the answer, in endings.json
MEASURED = {"before_zero_shot": "before", "before_one_shot": "before (one-shot)", "after_zero_shot": "after"}


def runs(columns: dict[str, str]) -> list[tuple[dict, list[dict], dict]]:
    """Evaluation, metrics of each step, record of each column's run."""
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
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [titles, ["---"] * len(titles), *rows])


def interval(figure: dict, form: str = "{:.1%} [{:.1%}, {:.1%}]") -> str:
    return form.format(figure["value"], *figure["interval"])


def results() -> str:
    """The evaluation of the laptop run at three seeds, with 95% intervals."""
    evaluations, rows = [e for e, _, _ in runs(LAPTOP)], []
    for what in ("strict_format", "strict_accuracy", "lenient_accuracy"):
        for when, title in MEASURED.items():
            figures = [e["measurements"][when][what] for e in evaluations]
            rows.append([f"{what.replace('_', ' ')}, {title}", *map(interval, figures)])
    for row, key in (("gain in strict accuracy, points", "strict_accuracy"), ("of it reasoning", "reasoning")):
        gains = [[100 * x for x in e["gain"][key]] for e in evaluations]
        rows.append([row, *("{:+.1f} [{:+.1f}, {:+.1f}]".format(*g) for g in gains)])
    rows.append(["of it format", *(f"{100 * e['gain']['format']:+.1f}" for e in evaluations)])
    rows.append(["**verdict**", *(f"**{e['verdict']}**" for e in evaluations)])
    return table(["laptop run, 512 test questions", *LAPTOP], rows)


def course(columns: dict[str, str] = LAPTOP, title: str = "laptop run, first and last ten steps") -> str:
    """What changes in the course of the laptop run: means of the first and of the last ten steps."""
    rows = []

    def ends(row: str, key: str, form: str, widest: bool = False) -> None:
        cells = []
        for _, metrics, _ in runs(columns):
            tens = [sum(m[key] for m in metrics[i - 10 : i]) / 10 for i in range(10, len(metrics) + 1)]
            picked = [tens[0], *([max(tens)] if widest else []), tens[-1]]
            cells.append(", ".join(map(form.format, picked)))
        rows.append([row, *cells])

    ends("soft format reward, at most 0.5", "rewards/soft_format_reward_func/mean", "{:.3f}")
    ends("strict format reward, at most 0.5", "rewards/strict_format_reward_func/mean", "{:.3f}")
    deviation = "its standard deviation: first, widest and last ten steps"
    ends(deviation, "rewards/strict_format_reward_func/std", "{:.3f}", widest=True)
    ends("xmlcount reward, at most 0.5", "rewards/xmlcount_reward_func/mean", "{:.3f}")
    ends("correctness reward, at most 2", "rewards/simple_correctness_reward_func/mean", "{:.3f}")
    ends("groups in which all rewards are equal", "frac_reward_zero_std", "{:.0%}")
    ends("tokens a completion", "completions/mean_length", "{:.1f}")
    ends("equations a completion", "reasoning/steps", "{:.2f}")
    ends("equations that are true", "reasoning/valid_steps", "{:.1%}")
    ends("KL to the untrained model", "kl", "{:.3f}")
    seconds = [f"{record['seconds']:.0f}" for _, _, record in runs(columns)]
    return table([title, *columns], [*rows, ["seconds from the first step to the verdict", *seconds]])


def qwen() -> str:
    """The run of a real Qwen2.5: its evaluation, the course of its rewards, and how its completions end."""
    ((evaluation, _, _),), (name,) = runs(QWEN), QWEN.values()
    measured = [evaluation["measurements"][when] for when in MEASURED]
    rows = []
    for what in ("soft_format", "strict_format", "strict_accuracy", "lenient_accuracy", "truncated"):
        rows.append([what.replace("_", " "), *(interval(figures[what]) for figures in measured)])
    rows.append(["tokens", *(interval(figures["tokens"], "{:.0f} [{:.0f}, {:.0f}]") for figures in measured)])
    first = table(["200 test questions", *MEASURED.values()], rows)
    said = " ".join([f"Verdict: **{evaluation['verdict']}**.", *evaluation["sentences"]])

    ends = json.loads((HERE / "runs" / name / "endings.json").read_text())
    steps = [key for key in ends if key.startswith("step ")]
    columns = {title: [when] for when, title in MEASURED.items()}
    columns |= {"steps 1 to 10": steps[:10], "last ten steps": steps[-10:]}
    counts = [sum((Counter(ends[key]) for key in keys), Counter()) for keys in columns.values()]
    tails = sorted({tail for count in counts for tail in count} - {"other", "none"}, key=lambda tail: (len(tail), tail))
    words = {"": "nothing", "other": "anything else", "none": "there is no `</answer>`"}
    words |= {STRAY[0]: f"{code(STRAY[0])}, a second one", STRAY[1]: f"{code(STRAY[0])}, the only one"}
    rows = [
        [words.get(tail, code(tail)), *(f"{count[tail] / count.total():.1%}" for count in counts)]
        for tail in [*tails, "other", "none"]
    ]
    second = table(["what follows the last `</answer>`", *columns], rows)
    return "\n".join([first, *textwrap.wrap(said, 120), "", course(QWEN, "first and last ten steps"), second])


def reliability() -> str:
    """What tests/test_nothing_lost.py did, from the rows it wrote.

    RELIABILITY=assets/runs/reliability.jsonl python -m pytest tests/test_nothing_lost.py
    """
    rows = [json.loads(line) for line in (HERE / "runs" / "reliability.jsonl").read_text().splitlines()]
    return table(["fault", "tried", "recovered", "steps missing in the end"], rows)


REWARDS = ["xmlcount", "soft", "strict", "int", "correct"]


def code(text: str) -> str:
    return "`" + text.replace("\n", "\\n") + "`"


def examples() -> str:
    """The five rewards by example, as `python rewards.py` prints them."""
    rows = []
    for _, text, why in EXAMPLES:
        got = [f(completions=[[{"content": text}]], answer=["18"])[0] for f in REWARD_FUNCS]
        rows.append([code(text), *(f"{reward:.3f}" for reward in got), f"**{sum(got):.3f}**", why])
    return table(["completion; the gold answer is 18", *REWARDS, "sum", "why"], rows)


def group() -> str:
    """A group of the run on record: its rewards, and the advantages that follow from them."""
    group = json.loads((HERE / "runs" / "laptop-42" / "group.json").read_text())
    got = [[row[f.__name__] for f in REWARD_FUNCS] for row in group]
    mean, std = statistics.mean(map(sum, got)), statistics.stdev(map(sum, got))
    rows = []
    for row, rewards in zip(group, got, strict=True):
        cells = [f"{reward:.3f}" for reward in [*rewards, sum(rewards)]]
        rows.append([code(row["completion"]), *cells, f"{(sum(rewards) - mean) / (std + 1e-4):+.3f}"])
    text = (
        f"Step {group[0]['step']}, *{group[0]['question']}* The gold answer is {group[0]['gold']}; the rewards have a "
    )
    text += f"mean of {mean:.3f} and a standard deviation of {std:.3f}.\n\n"
    return text + table([f"its {len(group)} completions", *REWARDS, "reward", "advantage"], rows)


def lines(name: str) -> dict[str, list[dict]]:
    """The runs of assets/experiments.py, by what was changed."""
    changes: dict[str, list[dict]] = {}
    for row in map(json.loads, (HERE / "runs" / f"{name}.jsonl").read_text().splitlines()):
        changes.setdefault(row["change"], []).append(row)
    return changes


def spread(values: list[float], form: str = "{:.1%}") -> str:
    """Mean over seeds, and the smallest and the largest."""
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(sum(values) / len(values)) + (f" ({low} to {high})" if low != high else "")


def at_the_end(row: dict, key: str = "rewards/strict_format_reward_func/mean") -> float:
    """Mean of the last ten steps of a curve; the strict format reward is at most 0.5."""
    return sum(row["curve"][key][-10:]) / 10


def steps_until_format(row: dict) -> int:
    """The first step at which half of the completions of the last five steps were strict XML; 61 if it never came."""
    curve = row["curve"]["rewards/strict_format_reward_func/mean"]
    return next((i for i in range(5, 61) if sum(curve[i - 5 : i]) >= 5 * 0.25), 61)


def settings() -> str:
    """How the laptop's learning rate was chosen: with other seeds; the accuracies are of validation questions."""
    rows = []
    for change, runs in lines("settings").items():
        accuracy = [
            [r["measured"][w]["lenient_accuracy"] for r in runs] for w in ("before_zero_shot", "after_zero_shot")
        ]
        reward = spread([at_the_end(run) for run in runs], "{:.3f}")
        rows.append([change.removeprefix("learning rate "), reward, *map(spread, accuracy)])
    titles = ["learning rate", "strict format reward, last ten steps", "lenient accuracy before", "after"]
    return table(titles, rows)


def parts() -> str:
    """What each part of the recipe does: the laptop run with one thing changed."""
    rows = []
    for change, runs in lines("parts").items():
        after = [run["measured"]["after_zero_shot"] for run in runs]
        cells = [spread([a[c] for a in after]) for c in ("strict_format", "strict_accuracy", "lenient_accuracy")]
        steps = [steps_until_format(run) for run in runs]
        cells.append(spread(steps, "{:.0f}") if max(steps) < 61 else ", ".join(map(str, steps)).replace("61", "never"))
        cells.append(spread([2 * at_the_end(run) for run in runs], "{:.0%}"))
        kl = spread([at_the_end(run, "kl") for run in runs], "{:.2f}")
        rows.append([change, *cells, kl if any(any(run["curve"]["kl"]) for run in runs) else "not measured"])
    titles = [
        "changed",
        "strict format",
        "strict accuracy",
        "lenient accuracy",
        "steps until format",
        "sampled strict XML, last ten steps",
    ]
    return table([*titles, "KL"], rows)


def updates() -> str:
    """What bf16 does to small updates: six steps, and how far the weights have moved."""
    rows = []
    for change, runs in lines("updates").items():
        moved = [
            spread([run["moved"][k] for run in runs], f) for k, f in (("changed", "{:.1%}"), ("distance", "{:.1e}"))
        ]
        rows.append([change, *moved])
    return table(["weights and Adam's state in", "weights that changed", "distance moved, relative"], rows)


def benchmark() -> str:
    """What assets/benchmark.md says of the laptop: its first two tables and what follows from them."""
    first, second = (HERE / "benchmark.md").read_text().split("### ")[1:3]
    split = {line.split(" | ")[0].strip("| "): line.strip(" |").split(" | ")[1:] for line in second.splitlines()[2:]}
    share = [cell.split(", ")[1] for cell in split["generate"]]
    text = f"One generate call of 64 in the place of the gist's four takes generation from {share[2]} of a step to "
    text += (
        f"{share[1]}, and an hour holds {split['steps an hour'][1]} steps instead of {split['steps an hour'][2]}, at "
    )
    text += (
        f"the same micro-batch of 16; with the laptop's 64 it is {share[0]}, and {split['steps an hour'][0]} steps. "
    )
    text += f"The five rewards are {split['five rewards'][0].split(', ')[1]} of a step."
    tables = [table.partition("\n\n")[2].strip() for table in (first, second)]
    return "\n".join([*textwrap.wrap(text, 120), "", tables[0], "", tables[1], ""])


TABLES = [results, examples, group, course, qwen, settings, parts, updates, benchmark, reliability]


def main() -> None:
    path = HERE.parent / "README.md"
    text = path.read_text()
    for make in TABLES:
        start, end = f"<!-- {make.__name__} -->\n", f"<!-- /{make.__name__} -->"
        before, _, rest = text.partition(start)
        text = before + start + make() + end + rest.partition(end)[2]
    path.write_text(text)


if __name__ == "__main__":
    main()
