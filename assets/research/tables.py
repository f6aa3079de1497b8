"""Write the tables and the numbers of README and assets/notes from the records in runs/.

    python -m assets.research.tables            # write them
    python -m assets.research.tables --check    # name the files out of date; exit status 1 if any

A table of TABLES stands between `<!-- name -->` and `<!-- /name -->`; the numbers of README's
findings come from the cells of these tables that FINDINGS lists in their order.
"""

import json
import re
import sys
from collections import namedtuple
from functools import partial
from math import inf
from pathlib import Path
from statistics import mean, stdev

from assets.research.record import RUNS, command_line, time_split
from rewards import REWARD_FUNCS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("assets/notes/*.md"))]
# title of the column: folder in runs/
LAPTOP = {f"seed {seed}": f"laptop-{seed}" for seed in (42, 1, 2)}
HALF = {"seed 42": "qwen-half-b"}  # Qwen2.5-Coder-0.5B
HALF_KL = {"seed 42": "qwen-vllm"}  # 0.5B with the KL penalty, fewer completions, pass@k
QWEN = {"seed 42": "qwen-1.5b"}  # the gist's size
MODELS = {"laptop, mean of 3 seeds": LAPTOP, "Qwen2.5-Coder 0.5B": HALF}
MODELS |= {"Qwen2.5-Coder 1.5B": QWEN}
BEFORE, SHOT, AFTER = "before_zero_shot", "before_one_shot", "after_zero_shot"
MEASURED = {BEFORE: "untrained", SHOT: "untrained, one-shot", AFTER: "trained"}
FINDING = {"strict_accuracy": [SHOT, AFTER], "lenient_accuracy": [BEFORE, SHOT, AFTER]}
ALL = ["soft_format", "strict_format", *FINDING, "truncated", "tokens"]
REWARDS = ["xmlcount", "soft", "strict", "int", "correct"]
STRICT_FORMAT = "rewards/strict_format_reward_func/mean"
COURSE = {  # title: metric, format
    "soft format reward, at most 0.5": ("rewards/soft_format_reward_func/mean", "{:.3f}"),
    "strict format reward, at most 0.5": (STRICT_FORMAT, "{:.3f}"),
    "its standard deviation": ("rewards/strict_format_reward_func/std", "{:.3f}"),
    "xmlcount reward, at most 0.5": ("rewards/xmlcount_reward_func/mean", "{:.3f}"),
    "correctness reward, at most 2": ("rewards/simple_correctness_reward_func/mean", "{:.3f}"),
    "groups in which all rewards are equal": ("frac_reward_zero_std", "{:.0%}"),
    "tokens a completion": ("completions/mean_length", "{:.1f}"),
    "KL to the untrained model": ("kl", "{:.3f}"),
}
Run = namedtuple("Run", "evaluation metrics")  # metrics: a dict a step


def read(name: str, file: str):
    """Return a JSON file of a record."""
    return json.loads((RUNS / name / f"{file}.json").read_text(encoding="utf-8"))


def read_lines(file: str) -> list:
    """Return the values of a file in runs/ with a JSON value a line."""
    return [json.loads(line) for line in (RUNS / file).read_text(encoding="utf-8").splitlines()]


def runs(columns: dict[str, str]) -> list[Run]:
    """Return the run of each column."""
    files = [(read(x, "evaluation"), read_lines(f"{x}/metrics.jsonl")) for x in columns.values()]
    return [Run(*pair) for pair in files]


def mean_value(figures: list[dict]) -> float:
    """Return the mean over runs of a figure."""
    return mean(figure["value"] for figure in figures)


def table(titles: list[str], rows: list[list]) -> str:
    """Return a Markdown table."""
    cells = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in cells)


def spread(values: list[float], form: str) -> str:
    """Return a cell: half of the range over seeds."""
    return form.format((max(values) - min(values)) / 2)


def results(shown: dict[str, list[str]]) -> str:
    """Return measures, each at some of the three measurements: laptop, two sizes of Qwen2.5."""
    rows = []
    for what, times in shown.items():
        form = "{:.0f}" if what == "tokens" else "{:.1%}"
        for when in times:
            row = [f"{what.replace('_', ' ')}, {MEASURED[when]}"]
            for found in map(runs, MODELS.values()):
                measured = [run.evaluation["measurements"][when][what]["value"] for run in found]
                row.append(form.format(mean(measured)))
            rows.append(row)
    rows += [["due to reasoning, points"], ["95% interval"], ["test questions"]]
    for columns in MODELS.values():
        gains = [run.evaluation["gain"]["reasoning"] for run in runs(columns)]
        ends = min(gain["low"] for gain in gains), max(gain["high"] for gain in gains)
        rows[-3].append(f"{100 * mean_value(gains):+.1f}")
        rows[-2].append(" to ".join(f"{100 * end:+.1f}" for end in ends))
        rows[-1].append(gains[0]["n"])
    return table(["on test questions", *MODELS], rows)


def course(columns: dict[str, str]) -> str:
    """Return what changes during a run: the first, the highest and the last ten steps."""
    titles, rows, found = ["first", "highest", "last", "± over seeds"], [], runs(columns)
    shown = 3 if len(found) == 1 else 4  # one run has no spread
    for title, (key, form) in COURSE.items():
        if key in found[0].metrics[0]:  # with beta 0 there is no KL
            each = [[step[key] for step in run.metrics] for run in found]
            tens = [[mean(x[i : i + 10]) for i in range(len(x) - 9)] for x in each]
            firsts, highest, lasts = zip(*((x[0], max(x), x[-1]) for x in tens), strict=True)
            cells = [form.format(mean(ends)) for ends in (firsts, highest, lasts)]
            rows.append([title, *[*cells, spread(lasts, form)][:shown]])
    return table(["mean of ten steps", *titles[:shown]], rows)


def passed(model: dict[str, str]) -> str:
    """Return pass@k of a model, and the widest spread over seeds, or interval of one run."""
    found, rows = [run.evaluation["pass"] for run in runs(model)], []
    columns = [(kind, when) for kind in ("lenient", "strict") for when in MEASURED]
    for k in found[0][AFTER]["lenient_accuracy"]:
        cells = [[x[when][f"{kind}_accuracy"][k] for x in found] for kind, when in columns]
        keys = ["value"] if len(model) > 1 else ["low", "high"]
        ends = [[c[key] for c in row for key in keys] for row in cells]
        widest = max(max(row) - min(row) for row in ends) / 2
        rows.append([k, *(f"{x:.1%}" for x in [*map(mean_value, cells), widest])])
    what = "over seeds" if len(model) > 1 else "95% interval"
    titles = [f"{MEASURED[when]}, {kind}" for kind, when in columns]
    return table(["k", *titles, f"{what}, at most ±"], rows)


def time() -> str:
    """Return how the time of a step splits in the runs of three sizes, each on two CPU cores."""
    split = {}
    for columns in MODELS.values():
        name = columns["seed 42"]
        parts = time_split(read_lines(f"{name}/metrics.jsonl"), read(name, "timers"))
        for part, seconds in parts.items():
            form = ".2%" if part == "five rewards" else ".0%"
            split.setdefault(part, []).append(f"{seconds / sum(parts.values()):{form}}")
        split.setdefault("seconds of a step", []).append(f"{sum(parts.values()):.3g}")
    titles = [title.replace("mean of 3 seeds", "seed 42") for title in MODELS]
    return table(["part", *titles], [[part, *cells] for part, cells in split.items()])


def three() -> str:
    """Return three of a group of the run on record: their rewards and advantages."""
    completions = read(LAPTOP["seed 42"], "group")
    got = [[row[f.__name__] for f in REWARD_FUNCS] for row in completions]
    sums = [sum(rewards) for rewards in got]
    rows = []
    for row, rewards, total in zip(completions, got, sums, strict=True):
        advantage = (total - mean(sums)) / (stdev(sums) + 1e-4)
        cells = [*(f"{reward:.3f}" for reward in [*rewards, total]), f"{advantage:+.3f}"]
        shown = row["completion"].replace("\n", "\\n\n").splitlines()  # a narrow page can break it
        rows.append([" ".join(f"`{line}`" for line in shown), *cells])
    # of different rewards, the best and the worst among them
    rows = sorted({row[-1]: row for row in rows}.values(), key=lambda row: -float(row[-1]))
    first, title = completions[0], f"3 of {len(completions)} completions"
    text = f"Step {first['step']} of the laptop run, the question with the most varied rewards: "
    text += (
        f"*{first['question']}* The gold answer is {first['gold']}; the rewards of the group have "
    )
    text += f"a mean of {mean(sums):.3f} and a standard deviation of {stdev(sums):.3f}.\n\n"
    return text + table([title, *REWARDS, "reward", "advantage"], [*rows[:2], rows[-1]])


def figures(row: dict) -> dict[str, float]:
    """Return the figures of a run of an experiment by the titles of its tables."""
    after, curve = row["measured"][AFTER], row["curve"][STRICT_FORMAT]
    steps = [i for i in range(5, len(curve) + 1) if sum(curve[i - 5 : i]) >= 5 * 0.25]
    return {
        **{what.replace("_", " "): share for what, share in after.items()},
        "steps until format": min(steps, default=inf),  # half of five steps' samples are strict
        LAST: mean(curve[-10:]),
        "strict XML, last ten steps": 2 * mean(curve[-10:]),
        "KL": mean(row["curve"]["kl"][-10:]) or inf,  # without beta none is measured
        "weights changed": row["moved"]["changed"],
        "distance": row["moved"]["distance"],
    }


LAST = "strict format reward, last ten steps"
STOPS = ["soft format", "strict format", "strict accuracy", "truncated"]
PARTS = {"strict accuracy": "{:.1%} ±", "steps until format": "{:.0f} ±"}
PARTS |= {"strict XML, last ten steps": "{:.0%} ±", "KL": "{:.2f}"}
MOVED = {"weights changed": "{:.1%}", "distance": "{:.1e}"}
EXPERIMENTS = {  # file: titles of what was changed; figures, with ± if the spread is shown too
    "settings": (["learning rate"], {LAST: "{:.3f} ±", "lenient accuracy": "{:.1%} ±"}),
    "parts": (["changed"], PARTS),
    "stops": (["generation"], dict.fromkeys(STOPS, "{:.1%}") | {LAST: "{:.3f}"}),
    "updates": (["weights, Adam's state", "learning rate"], MOVED),
}


def experiment(name: str) -> str:
    """Return the table of an experiment: what was changed, means over seeds, half of the range."""
    first, shown = EXPERIMENTS[name]
    pairs = [[title, "±"] if "±" in form else [title] for title, form in shown.items()]
    rows, changes = [], {}
    for row in read_lines(f"{name}.jsonl"):
        changes.setdefault(row["change"], []).append(row)  # one for each seed
    for change, seeds in changes.items():
        cells = [x.removesuffix(", ") for x in change.split("learning rate ") if x]
        for title, form in shown.items():
            got = [figures(row)[title] for row in seeds]
            plain = form.strip(" ±")
            both = [plain.format(mean(got)), spread(got, plain)] if max(got) < inf else ["–", ""]
            cells += both if "±" in form else both[:1]
        rows.append(cells)
    return table(sum(pairs, first), rows)


TABLES = {
    "results": lambda: results(FINDING),
    "sizes": lambda: results({what: list(MEASURED) for what in ALL}),
    "three": three,
    "course": lambda: course(LAPTOP),
    "qwen_course": lambda: course(QWEN),
    "half_course": lambda: course(HALF),
    "passed": lambda: passed(LAPTOP),
    "qwen_passed": lambda: passed(QWEN),
    "half_passed": lambda: passed(HALF_KL),
    "time": time,
    **{name: partial(experiment, name) for name in EXPERIMENTS},
}


def cell(name: str, row: str, column: str) -> str:
    """Return a cell of a table by the beginnings of its row and of its column's title."""
    titles, _, *rows = TABLES[name]().splitlines()
    found = next(line for line in rows if line.startswith(f"| {row}"))
    place = [title.startswith(column) for title in titles[2:-2].split(" | ")].index(True)
    return found[2:-2].split(" | ")[place]


FINDINGS = """
qwen_course; strict; first | qwen_course; strict; last | course; strict; first
course; strict; last | results; due; laptop | results; due; Qwen2.5-Coder 0.5B
results; due; Qwen2.5-Coder 1.5B | sizes; strict accuracy, untrained, one; laptop
sizes; strict accuracy, untrained, one; Qwen2.5-Coder 1.5B | sizes; strict accuracy, trained; laptop
sizes; strict accuracy, trained; Qwen2.5-Coder 1.5B | passed; 1; trained, lenient
passed; 16; trained, lenient | passed; 1; untrained, one-shot, lenient
passed; 16; untrained, one-shot, lenient | qwen_passed; 1; trained, lenient
qwen_passed; 8; trained, lenient | qwen_passed; 1; untrained, one-shot, lenient
qwen_passed; 8; untrained, one-shot, lenient | sizes; strict format, trained; Qwen2.5-Coder 0.5B
stops; does not; strict format | stops; does not; soft format
parts; without correctness; strict accuracy | parts; without correctness; ±
parts; nothing changed; strict accuracy | parts; correctness only; strict XML
updates; bfloat16; weights changed | updates; float32; weights changed | time; five; laptop
time; generate; laptop | time; generate; Qwen2.5-Coder 0.5B | time; generate; Qwen2.5-Coder 1.5B
"""


def put_numbers(page: str) -> str:
    """Return README with the numbers of its findings: three decimals, a sign or a percent sign."""
    title = "## What we learned\n"
    start = page.index(title)
    findings = page[start : page.index("\n## ", start)]
    numbers = [cell(*each.split("; ")) for each in re.split(r" \| |\n", FINDINGS.strip())]
    prose = re.split(r"\d\.\d{3}|[-+]\d+\.\d|\d[\d.]*%", findings)
    if len(prose) != len(numbers) + 1:
        sys.exit(f"README's findings have {len(prose) - 1} numbers, FINDINGS {len(numbers)}")
    return page.replace(findings, "".join(map("".join, zip(prose, [*numbers, ""], strict=True))))


def fill(path: Path) -> str:
    """Return the text of a page with its tables, and README's numbers, made anew."""
    page = path.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- /(\w+) -->", page):
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        page = before + start + TABLES[name]() + rest[rest.index(f"<!-- /{name} -->") :]
    return put_numbers(page) if path.name == "README.md" else page


def main() -> None:
    """Write tables and numbers into their pages; with `--check`, only say what would change."""
    parser = command_line(__doc__)
    parser.add_argument("--check", action="store_true", help="only name the files out of date")
    check = parser.parse_args().check
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    if lost := set(re.findall(r"<!-- /(\w+) -->", text)) ^ TABLES.keys():
        sys.exit(f"tables on a page or in tables.py, but not in both: {', '.join(sorted(lost))}")
    pages = {path: fill(path) for path in PAGES}
    changed = [path for path in PAGES if pages[path] != path.read_text(encoding="utf-8")]
    for path in changed:
        print("out of date:" if check else "wrote", path.relative_to(ROOT))
        if not check:
            path.write_text(pages[path], encoding="utf-8")
    sys.exit(1 if check and changed else 0)


if __name__ == "__main__":
    main()
