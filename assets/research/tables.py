"""Write the tables of README and assets/notes from the records in assets/runs.

python assets/tables.py            # write them
python assets/tables.py --check    # name the files that are out of date; exit status 1 if any is

A table stands between `<!-- name -->` and `<!-- /name -->`; `name` is a function of this file.
"""

import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from rewards import EXAMPLES, REWARD_FUNCS  # noqa: E402

FILES = [HERE.parent / "README.md", *sorted(HERE.glob("notes/*.md"))]
# title of the column: folder in assets/runs
LAPTOP = {f"seed {seed}": f"laptop-{seed}" for seed in (42, 1, 2)}
QWEN = {"seed 42": "qwen-half-b"}
QWEN_AGAIN = {"seed 42": "qwen-vllm"}
# a closing tag after the answer, in endings.json
STRAY = ["\n</reasoning>", "\n</reasoning> (the only one)"]
MEASURED = {
    "before_zero_shot": "untrained",
    "before_one_shot": "untrained, one-shot",
    "after_zero_shot": "trained",
}
MEASURES = ["soft_format", "strict_format", "strict_accuracy", "lenient_accuracy", "truncated"]
KINDS = ("lenient", "strict")  # right in any form, right inside the tags
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


def spread(values: list[float], form: str = "{:.1%}") -> list[str]:
    """Return two cells: the mean over seeds, and half of the range."""
    half = (max(values) - min(values)) / 2
    return [form.format(sum(values) / len(values)), form.format(half).lstrip("+")]


def widest(cells: list[dict]) -> float:
    """Return the widest half of the 95% intervals."""
    return max((cell["interval"][1] - cell["interval"][0]) / 2 for cell in cells)


def measured(columns: dict[str, str], when: str, what: str) -> list[float]:
    """Return a figure of the evaluation, for each run."""
    return [e["measurements"][when][what]["value"] for e, _, _ in runs(columns)]


def reasoning(columns: dict[str, str]) -> list[float]:
    """Return the gain that is due to reasoning, in points, for each run."""
    return [100 * e["gain"]["reasoning"][0] for e, _, _ in runs(columns)]


def results() -> str:
    """Return the finding in five rows: laptop (three seeds), real Qwen."""
    both, after = (LAPTOP, QWEN), "after_zero_shot"
    rows = []
    for what in ("soft_format", "strict_accuracy", "lenient_accuracy"):
        means = [statistics.mean(measured(columns, after, what)) for columns in both]
        rows.append([f"{what.replace('_', ' ')}, trained", *map("{:.1%}".format, means)])
    shot = [measured(columns, "before_one_shot", "strict_accuracy")[0] for columns in both]
    rows.append(["strict accuracy, untrained, one-shot", *map("{:.1%}".format, shot)])
    gains = [statistics.mean(reasoning(columns)) for columns in both]
    rows.append(["due to reasoning, points", *map("{:+.1f}".format, gains)])
    titles = ["laptop model, mean of 3 seeds", "Qwen2.5-Coder-0.5B, 1 seed"]
    return table(["on test questions", *titles], rows)


def evaluation() -> str:
    """Return the evaluation of the laptop run: mean of three seeds, half of their range."""
    rows = []
    for what in (*MEASURES[:-1], "tokens"):
        form = "{:.1f}" if what == "tokens" else "{:.1%}"
        cells = [form.format(measured(LAPTOP, when, what)[0]) for when in list(MEASURED)[:2]]
        cells += spread(measured(LAPTOP, "after_zero_shot", what), form)
        rows.append([what.replace("_", " "), *cells])
    return table(["512 test questions", *MEASURED.values(), "± over seeds"], rows)


def gains() -> str:
    """Return the gain of each laptop run and what of it is due to reasoning."""
    rows = []
    for title, (result, _, _) in zip(LAPTOP, runs(LAPTOP), strict=True):
        gain = result["gain"]
        cells = [gain["strict_accuracy"][0], *gain["reasoning"]]
        rows.append([title, *(f"{100 * cell:+.1f}" for cell in cells)])
    titles = ["strict accuracy gained", "due to reasoning"]
    return table(["points", *titles, "its 95% interval from", "to"], rows)


def ten_step_means(metrics: list[dict], key: str) -> list[float]:
    """Return the means of all ten consecutive steps of a run."""
    return [sum(m[key] for m in metrics[i - 10 : i]) / 10 for i in range(10, len(metrics) + 1)]


COURSE = {  # title: metric, format
    "soft format reward, at most 0.5": ("rewards/soft_format_reward_func/mean", "{:.3f}"),
    "strict format reward, at most 0.5": ("rewards/strict_format_reward_func/mean", "{:.3f}"),
    "its standard deviation": ("rewards/strict_format_reward_func/std", "{:.3f}"),
    "xmlcount reward, at most 0.5": ("rewards/xmlcount_reward_func/mean", "{:.3f}"),
    "correctness reward, at most 2": ("rewards/simple_correctness_reward_func/mean", "{:.3f}"),
    "groups in which all rewards are equal": ("frac_reward_zero_std", "{:.0%}"),
    "tokens a completion": ("completions/mean_length", "{:.1f}"),
    "KL to the untrained model": ("kl", "{:.3f}"),
}


def course(columns: dict[str, str] = LAPTOP) -> str:
    """Return what changes during a run: the first, the highest and the last ten steps."""
    rows = []
    for row, (key, form) in COURSE.items():
        tens = [ten_step_means(metrics, key) for _, metrics, _ in runs(columns)]
        ends = [[f(ten) for ten in tens] for f in (lambda t: t[0], max, lambda t: t[-1])]
        cells = [form.format(statistics.mean(values)) for values in ends]
        rows.append([row, *cells, *(spread(ends[-1], form)[1:] if len(columns) > 1 else [])])
    titles = ["mean of ten steps", "first", "highest", "last"]
    return table([*titles, *(["± over seeds"] if len(columns) > 1 else [])], rows)


def pass_at_k(columns: dict[str, str], when: str, kind: str) -> dict[int, list[dict]]:
    """Return k -> pass@k of each run (value, n, interval), at one of the three measurements."""
    results = [result for result, _, _ in runs(columns)]
    if not all("pass" in result for result in results):
        sys.exit("a record has no pass@k: make it with --eval_generations 16")
    cells = [result["pass"][when][f"{kind}_accuracy"] for result in results]
    return {int(k): [each[k] for each in cells] for k in cells[0]}


def passed() -> str:
    """Return pass@k of the laptop model: untrained with both prompts, and trained."""
    plain = pass_at_k(LAPTOP, "before_zero_shot", "lenient")
    shot = pass_at_k(LAPTOP, "before_one_shot", "strict")
    trained = pass_at_k(LAPTOP, "after_zero_shot", "strict")
    rows = []
    for k in plain:
        means = [statistics.mean(cell["value"] for cell in cells[k]) for cells in (plain, shot)]
        after = spread([cell["value"] for cell in trained[k]])
        rows.append([k, *map("{:.1%}".format, means), *after])
    titles = ["untrained, lenient", "untrained, one-shot, strict", "trained, strict"]
    return table(["k", *titles, "± over seeds"], rows)


def qwen_passed() -> str:
    """Return pass@k of the real Qwen2.5, with the widest half of the 95% intervals in a row."""
    titles = {f"{title}, {kind}": (w, kind) for kind in KINDS for w, title in MEASURED.items()}
    columns = [pass_at_k(QWEN_AGAIN, *which) for which in titles.values()]
    rows = []
    for k in columns[0]:
        cells = [column[k][0] for column in columns]
        rows.append([k, *(f"{x:.1%}" for x in (*(c["value"] for c in cells), widest(cells)))])
    return table(["k", *titles, "95% interval, at most ±"], rows)


def tails() -> str:
    """Return how the completions of the real Qwen end, from its endings.json."""
    ends = json.loads((HERE / "runs" / QWEN["seed 42"] / "endings.json").read_text())
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
    """Return the evaluation of the real Qwen2.5, with the widest half of the 95% intervals."""
    ((result, _, _),) = runs(QWEN)
    rows = []
    for what in ("soft_format", *MEASURES[2:], "tokens"):  # strict format is 0 throughout
        cells = [result["measurements"][when][what] for when in MEASURED]
        form = "{:.0f}" if what == "tokens" else "{:.1%}"
        numbers = map(form.format, [*(c["value"] for c in cells), widest(cells)])
        rows.append([what.replace("_", " "), *numbers])
    return table(["200 test questions", *MEASURED.values(), "95% interval, at most ±"], rows)


def qwen_course() -> str:
    """Return what changes during the run of the real Qwen2.5."""
    return course(QWEN)


def qwen_again_course() -> str:
    """Return what changes during the second run of the real Qwen2.5, with vLLM."""
    return course(QWEN_AGAIN)


def reliability() -> str:
    """Return what tests/test_nothing_lost.py and tests/test_rewards.py tried.

    RELIABILITY=assets/runs/reliability.jsonl python -m pytest \\
        tests/test_nothing_lost.py tests/test_rewards.py
    """
    lines = (HERE / "runs" / "reliability.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(recovered == tried for _, tried, recovered, _ in rows if recovered)
    return table(["fault", "tried"], [row[:2] for row in rows if row[2]])


def code(text: str) -> str:
    return "`" + text.replace("\n", "\\n") + "`"


def examples() -> str:
    """Return the five rewards by example, as `python rewards.py` prints them."""
    rows = []
    for _, text, why in EXAMPLES:
        got = [f(completions=[[{"content": text}]], answer=["18"])[0] for f in REWARD_FUNCS]
        rows.append([code(text), *(f"{reward:.3f}" for reward in got), f"**{sum(got):.3f}**", why])
    return table(["completion; the gold answer is 18", *REWARDS, "sum", "why"], rows)


def group(count: int | None = None) -> str:
    """Return a group of the run on record, or `count` of it: its rewards and advantages."""
    group = json.loads((HERE / "runs" / LAPTOP["seed 42"] / "group.json").read_text())
    got = [[row[f.__name__] for f in REWARD_FUNCS] for row in group]
    mean, std = statistics.mean(map(sum, got)), statistics.stdev(map(sum, got))
    rows = []
    for row, rewards in zip(group, got, strict=True):
        cells = [f"{reward:.3f}" for reward in [*rewards, sum(rewards)]]
        advantage = (sum(rewards) - mean) / (std + 1e-4)
        rows.append([code(row["completion"]), *cells, f"{advantage:+.3f}"])
    if count:  # of different rewards, the best and the worst among them
        rows = sorted({row[-1]: row for row in rows}.values(), key=lambda row: -float(row[-1]))
        rows = [*rows[: count - 1], rows[-1]]
    text = f"Step {group[0]['step']} of the laptop run, the question with the most varied rewards: "
    text += f"*{group[0]['question']}* The gold answer is "
    text += f"{group[0]['gold']}; the rewards of the group have a mean of {mean:.3f} and a "
    text += f"standard deviation of {std:.3f}.\n\n"
    shown = f"{len(rows)} of {len(group)} completions" if count else f"{len(group)} completions"
    return text + table([shown, *REWARDS, "reward", "advantage"], rows)


def three() -> str:
    """Return three completions of a group."""
    return group(3)


def lines(name: str) -> dict[str, list[dict]]:
    """Return the runs of assets/experiments.py, by what was changed."""
    changes: dict[str, list[dict]] = {}
    for row in map(json.loads, (HERE / "runs" / f"{name}.jsonl").read_text().splitlines()):
        changes.setdefault(row["change"], []).append(row)
    return changes


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
        reward = spread([at_the_end(run) for run in runs], "{:.3f}")
        after = spread([run["measured"]["after_zero_shot"]["lenient_accuracy"] for run in runs])
        rows.append([change.removeprefix("learning rate "), *reward, *after])
    titles = ["strict format reward, last ten steps", "±", "lenient accuracy, trained", "±"]
    return table(["learning rate", *titles], rows)


def parts() -> str:
    """Return what each part of the recipe does: the laptop run with one thing changed."""
    rows = []
    for change, runs in lines("parts").items():
        after = [run["measured"]["after_zero_shot"]["strict_accuracy"] for run in runs]
        steps = [steps_until_format(run) for run in runs]
        late = max(steps) > 60
        cells = spread(after) + (["never", ""] if late else spread(steps, "{:.0f}"))
        cells += spread([2 * at_the_end(run) for run in runs], "{:.0%}")
        kl = f"{statistics.mean(at_the_end(run, 'kl') for run in runs):.2f}"
        measured = any(any(run["curve"]["kl"]) for run in runs)
        rows.append([change, *cells, kl if measured else "not measured"])
    titles = ["changed", "strict accuracy", "±", "steps until format", "±"]
    return table([*titles, "strict XML, last ten steps", "±", "KL"], rows)


def updates() -> str:
    """Return what bf16 does to small updates: six steps, and how far the weights have moved."""
    rows = []
    for change, runs in lines("updates").items():
        changed = statistics.mean(run["moved"]["changed"] for run in runs)
        distance = statistics.mean(run["moved"]["distance"] for run in runs)
        dtype, rate = change.split(", learning rate ")
        rows.append([dtype, rate, f"{changed:.1%}", f"{distance:.1e}"])
    return table(["weights, Adam's state", "learning rate", "weights changed", "distance"], rows)


def benchmark() -> str:
    """Return the time split of assets/benchmark.md, and its GPU table if there is one."""
    parts = (HERE / "benchmark.md").read_text().split("### ")[1:]
    _, split, _, *gpu = [part.split("\n\n")[1].strip() for part in parts]
    return "\n\n".join([split, *gpu]) + "\n"


def write(text: str) -> str:
    """Return a page with all its tables made anew."""
    for name in re.findall(r"<!-- /(\w+) -->", text):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = before + start + globals()[name]() + end + rest.partition(end)[2]
    return text


def main() -> None:
    """Write the tables into their pages; with `--check`, only say which pages would change."""
    pages = {path: (path.read_text(), write(path.read_text())) for path in FILES}
    changed = [path for path, (old, new) in pages.items() if old != new]
    for path in changed:
        print("out of date:" if "--check" in sys.argv else "wrote", path.relative_to(HERE.parent))
        if "--check" not in sys.argv:
            path.write_text(pages[path][1])
    if not changed:
        print("all tables are up to date")
    sys.exit(1 if changed and "--check" in sys.argv else 0)


if __name__ == "__main__":
    main()
