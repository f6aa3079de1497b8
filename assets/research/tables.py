"""Write the tables and the numbers of README and assets/notes from the records in runs/.

    python -m assets.research.tables            # write them
    python -m assets.research.tables --check    # name the files out of date; exit status 1 if any

A table of TABLES stands between `<!-- name -->` and `<!-- /name -->`, a number of `numbers` right
before `<!--name-->`.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from assets.research.record import RUNS, time_split
from rewards import EXAMPLES, REWARD_FUNCS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("assets/notes/*.md"))]
# title of the column: folder in runs/
LAPTOP = {f"seed {seed}": f"laptop-{seed}" for seed in (42, 1, 2)}
HALF = {"seed 42": "qwen-half-b"}  # Qwen2.5-Coder-0.5B
HALF_STOPS = "qwen-half-b-wrong-stops"  # its first 12 steps without a stop at <|endoftext|>
HALF_KL = {"seed 42": "qwen-vllm"}  # 0.5B with the KL penalty, fewer completions, pass@k
QWEN = {"seed 42": "qwen-1.5b"}  # the gist's size
TRIALS = ["qwen-1.5b-5e-5", "qwen-1.5b", "qwen-1.5b-2e-4"]  # learning rates: its first six steps
STRAY = "\n</reasoning>"  # a second one, after the answer, in endings.json
BEFORE, SHOT, AFTER = "before_zero_shot", "before_one_shot", "after_zero_shot"
MEASURED = {BEFORE: "untrained", SHOT: "untrained, one-shot", AFTER: "trained"}
# Columns of `results`
LAPTOP_MEAN, HALF_B, ONE_B = "laptop, mean of 3 seeds", "Qwen2.5 0.5B", "Qwen2.5 1.5B"
MODELS = {LAPTOP_MEAN: LAPTOP, HALF_B: HALF, ONE_B: QWEN}
FINDING = {"strict_accuracy": [SHOT, AFTER], "lenient_accuracy": [BEFORE, AFTER]}
ACCURACIES = ["strict_accuracy", "lenient_accuracy"]
ALL_MEASURES = ["soft_format", "strict_format", *ACCURACIES, "truncated", "tokens"]
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


TRIAL = {
    "reward": ("reward", "{:.2f}"),
    "soft format reward, at most 0.5": ("rewards/soft_format_reward_func/mean", "{:.2f}"),
    "right in any form": ("accuracy/lenient", "{:.0%}"),
}
WITHOUT = "without correctness"  # a row of `parts`
COMPLETIONS = {"right in any form": "accuracy/lenient", "cut off": "completions/clipped_ratio"}


class Run(NamedTuple):
    """A run on record."""

    evaluation: dict  # evaluation.json
    metrics: list[dict]  # a dict a step
    record: dict  # record.json


def read(name: str, file: str):
    """Return a JSON file of a record."""
    return json.loads((RUNS / name / f"{file}.json").read_text())


def read_lines(file: str) -> list:
    """Return the values of a file in runs/ with a JSON value a line."""
    return [json.loads(line) for line in (RUNS / file).read_text().splitlines()]


def runs(columns: dict[str, str]) -> list[Run]:
    """Return the run of each column."""
    found = []
    for name in columns.values():
        metrics = read_lines(f"{name}/metrics.jsonl")
        found.append(Run(read(name, "evaluation"), metrics, read(name, "record")))
    return found


def lines(name: str) -> dict[str, list[dict]]:
    """Return the runs of an experiment by what was changed, a dict for each seed."""
    changes: dict[str, list[dict]] = {}
    for row in read_lines(f"{name}.jsonl"):
        changes.setdefault(row["change"], []).append(row)
    return changes


def values(columns: dict[str, str], when: str, what: str) -> list[float]:
    """Return a figure of the evaluation, without its interval, for each run."""
    return [run.evaluation["measurements"][when][what]["value"] for run in runs(columns)]


def pass_at_k(columns: dict[str, str], when: str, kind: str) -> dict[int, list[dict]]:
    """Return k -> pass@k of each run (value, n, low, high), at one of the three measurements."""
    evaluations = [run.evaluation for run in runs(columns)]
    if not all("pass" in evaluation for evaluation in evaluations):
        sys.exit("a record has no pass@k: make it with --eval_generations 16")
    found = [evaluation["pass"][when][f"{kind}_accuracy"] for evaluation in evaluations]
    return {int(k): [shares[k] for shares in found] for k in found[0]}


def mean_value(figures: list[dict]) -> float:
    """Return the mean over runs of a figure."""
    return mean(figure["value"] for figure in figures)


def ten_step_means(metrics: list[dict], key: str) -> list[float]:
    """Return the means of all ten consecutive steps of a run."""
    return [mean(m[key] for m in metrics[i - 10 : i]) for i in range(10, len(metrics) + 1)]


def at_the_end(row: dict, key: str = STRICT_FORMAT) -> float:
    """Return the mean of the last ten steps of a run of an experiment."""
    return mean(row["curve"][key][-10:])


def steps_until_format(row: dict) -> int:
    """Return the first step at which half of the last five steps' samples were strict; else 61."""
    curve = row["curve"][STRICT_FORMAT]
    return next((i for i in range(5, 61) if sum(curve[i - 5 : i]) >= 5 * 0.25), 61)


def time_shares(name: str) -> dict[str, float]:
    """Return the share of each part of a step in a run's time."""
    split = time_split(read_lines(f"{name}/metrics.jsonl"), read(name, "timers"))
    return {part: seconds / sum(split.values()) for part, seconds in split.items()}


def table(titles: list[str], rows: list[list]) -> str:
    """Return a Markdown table."""
    cells = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in cells)


def code(text: str) -> str:
    """Return a text as code in a Markdown table."""
    return "`" + text.replace("\n", "\\n") + "`"


def code_lines(text: str) -> str:
    """Return a text as one code span a line, so that a narrow page can break it."""
    return " ".join(f"`{line}`" for line in text.replace("\n", "\\n\n").splitlines())


def spread(values: list[float], form: str = "{:.1%}") -> list[str]:
    """Return two cells: the mean over seeds, and half of the range."""
    return [form.format(mean(values)), form.format((max(values) - min(values)) / 2)]


def with_widest(figures: list[dict]) -> list[str]:
    """Return a cell for each figure, and one for the widest half of their 95% intervals."""
    halves = [(figure["high"] - figure["low"]) / 2 for figure in figures]
    return [f"{x:.1%}" for x in [*(figure["value"] for figure in figures), max(halves)]]


def results(shown: dict[str, list[str]]) -> str:
    """Return the finding at three sizes: laptop (three seeds), two sizes of Qwen2.5.

    shown  measure: at which of the three measurements; percents but for `tokens`
    """
    rows = []
    for what, times in shown.items():
        form = "{:.0f}" if what == "tokens" else "{:.1%}"
        for when in times:
            cells = [form.format(mean(values(c, when, what))) for c in MODELS.values()]
            rows.append([f"{what.replace('_', ' ')}, {MEASURED[when]}", *cells])
    rows += [["due to reasoning, points"], ["95% interval"], ["test questions"]]
    for columns in MODELS.values():
        gains = [run.evaluation["gain"]["reasoning"] for run in runs(columns)]
        ends = min(gain["low"] for gain in gains), max(gain["high"] for gain in gains)
        rows[-3].append(f"{100 * mean_value(gains):+.1f}")
        rows[-2].append(" to ".join(f"{100 * end:+.1f}" for end in ends))
        rows[-1].append(gains[0]["n"])
    return table(["on test questions", *MODELS], rows)


def evaluation() -> str:
    """Return the evaluation of the laptop run: mean of three seeds, half of their range."""
    rows = []
    for what in ("soft_format", "strict_format", "strict_accuracy", "lenient_accuracy", "tokens"):
        form = "{:.1f}" if what == "tokens" else "{:.1%}"
        untrained = [form.format(values(LAPTOP, when, what)[0]) for when in (BEFORE, SHOT)]
        after = spread(values(LAPTOP, AFTER, what), form)
        rows.append([what.replace("_", " "), *untrained, *after])
    return table(["512 test questions", *MEASURED.values(), "± over seeds"], rows)


def gains() -> str:
    """Return the gain of each laptop run and what of it is due to reasoning."""
    rows = []
    for title, run in zip(LAPTOP, runs(LAPTOP), strict=True):
        strict, lenient = (run.evaluation["gain"][key] for key in ("strict_accuracy", "reasoning"))
        shown = [strict["value"], lenient["value"], lenient["low"], lenient["high"]]
        rows.append([title, *(f"{100 * share:+.1f}" for share in shown)])
    titles = ["strict accuracy gained", "due to reasoning"]
    return table(["points", *titles, "its 95% interval from", "to"], rows)


def course(columns: dict[str, str]) -> str:
    """Return what changes during a run: the first, the highest and the last ten steps."""
    titles = ["mean of ten steps", "first", "highest", "last", "± over seeds"]
    rows = []
    measured = runs(columns)[0].metrics[0]  # with beta 0 there is no KL
    for title, (key, form) in COURSE.items():
        if key not in measured:
            continue
        tens = [ten_step_means(run.metrics, key) for run in runs(columns)]
        first = form.format(mean(ten[0] for ten in tens))
        highest = form.format(mean(max(ten) for ten in tens))
        rows.append([title, first, highest, *spread([ten[-1] for ten in tens], form)])
    shown = 4 if len(columns) == 1 else 5  # one run has no spread
    return table(titles[:shown], [row[:shown] for row in rows])


def passed() -> str:
    """Return pass@k of the laptop model: untrained with both prompts, and trained."""
    plain = pass_at_k(LAPTOP, BEFORE, "lenient")
    shot = pass_at_k(LAPTOP, SHOT, "strict")
    after = pass_at_k(LAPTOP, AFTER, "strict")
    rows = []
    for k in plain:
        untrained = [f"{mean_value(cells[k]):.1%}" for cells in (plain, shot)]
        rows.append([k, *untrained, *spread([figure["value"] for figure in after[k]])])
    titles = ["untrained, lenient", "untrained, one-shot, strict", "trained, strict"]
    return table(["k", *titles, "± over seeds"], rows)


def qwen_passed(model: dict[str, str]) -> str:
    """Return pass@k of a Qwen2.5, with the widest half of the 95% intervals in a row."""
    (run,) = runs(model)
    columns = {
        f"{MEASURED[when]}, {kind}": pass_at_k(model, when, kind)
        for kind in ("lenient", "strict")
        for when in run.evaluation["pass"]
    }
    ks = next(iter(columns.values()))
    rows = [[k, *with_widest([column[k][0] for column in columns.values()])] for k in ks]
    return table(["k", *columns, "95% interval, at most ±"], rows)


def default_command() -> str:
    """Return what two steps of the default command at its own size took."""
    record = read("qwen-1.5b-default", "record")
    metrics = read_lines("qwen-1.5b-default/metrics.jsonl")
    timers = read("qwen-1.5b-default", "timers")
    generation = timers["transformers.generate"]
    rows = [["peak resident memory, GB", f"{record['peak_memory_gb']:.1f}"]]
    rows += [["seconds of a step", f"{mean(step['step_time'] for step in metrics):,.0f}"]]
    rows += [["of these, generation", f"{mean(generation):,.0f}"]]
    rows += [["milliseconds of the five rewards", f"{1000 * reward_seconds(timers):.2f}"]]
    rows += [["loss of step 1", f"{metrics[0]['loss']:.0e}"]]
    rows += [["weights changed by step 2", f"{record['moved']['changed']:.1%}"]]
    for name, key in COMPLETIONS.items():
        rows += [[f"{name}, step {i}", f"{step[key]:.1%}"] for i, step in enumerate(metrics, 1)]
    return table(["two steps of 64 completions", "measured"], rows)


def reward_seconds(timers: dict[str, list[float]]) -> float:
    """Return the mean seconds of the five rewards in a step."""
    return sum(mean(seconds) for name, seconds in timers.items() if name.endswith("_reward_func"))


def tails() -> str:
    """Return how completions of the 0.5B Qwen end, with right and with wrong stop tokens."""
    right, wrong = read(HALF["seed 42"], "endings"), read(HALF_STOPS, "endings")
    columns = {"trained, test answers": [right[AFTER]]}
    for title, ends in {"right stop tokens": right, "wrong": wrong}.items():
        for first, last in ((1, 6), (7, 12)):
            steps = [ends[f"step {step}"] for step in range(first, last + 1)]
            columns[f"{title}, steps {first} to {last}"] = steps
    counts = [sum(map(Counter, parts), Counter()) for parts in columns.values()]
    words = {"": "nothing", "\n": "a newline", STRAY: f"{code(STRAY)}, a second one"}
    words |= {"none": "there is no `</answer>`", "other": "anything else"}
    counts = [Counter(t if t in words else "other" for t in count.elements()) for count in counts]
    rows = []
    for tail, title in words.items():
        rows.append([title, *(f"{count[tail] / count.total():.1%}" for count in counts)])
    return table(["what follows the last `</answer>`", *columns], rows)


def reliability() -> str:
    """Return what tests/test_nothing_lost.py and tests/test_rewards.py tried."""
    rows = [row for row in read_lines("reliability.jsonl") if row[2]]  # what can recover
    assert all(recovered == tried for _, tried, recovered, _ in rows)
    return table(["fault", "tried"], [row[:2] for row in rows])


def examples() -> str:
    """Return the five rewards by example, as `python rewards.py` prints them."""
    rows = []
    for _, text, why in EXAMPLES:
        got = [f(completions=[[{"content": text}]], answer=["18"])[0] for f in REWARD_FUNCS]
        rows.append(
            [code_lines(text), *(f"{reward:.3f}" for reward in got), f"**{sum(got):.3f}**", why]
        )
    return table(["completion; the gold answer is 18", *REWARDS, "sum", "why"], rows)


def group(count: int | None = None) -> str:
    """Return a group of the run on record, or `count` of it: its rewards and advantages."""
    completions = read(LAPTOP["seed 42"], "group")
    got = [[row[f.__name__] for f in REWARD_FUNCS] for row in completions]
    sums = [sum(rewards) for rewards in got]
    middle, deviation = mean(sums), stdev(sums)
    rows = []
    for row, rewards, total in zip(completions, got, sums, strict=True):
        cells = [f"{reward:.3f}" for reward in [*rewards, total]]
        advantage = (total - middle) / (deviation + 1e-4)
        rows.append([code_lines(row["completion"]), *cells, f"{advantage:+.3f}"])
    shown = f"{len(rows)} completions"
    if count:  # of different rewards, the best and the worst among them
        shown = f"{count} of {shown}"
        rows = sorted({row[-1]: row for row in rows}.values(), key=lambda row: -float(row[-1]))
        rows = [*rows[: count - 1], rows[-1]]
    first = completions[0]
    text = (
        f"Step {first['step']} of the laptop run, the question with the most varied rewards: "
        f"*{first['question']}* The gold answer is {first['gold']}; the rewards of the group have "
        f"a mean of {middle:.3f} and a standard deviation of {deviation:.3f}.\n\n"
    )
    return text + table([shown, *REWARDS, "reward", "advantage"], rows)


def settings() -> str:
    """Return how the laptop's learning rate was chosen: other seeds, validation questions."""
    rows = []
    for change, seeds in lines("settings").items():
        reward = spread([at_the_end(row) for row in seeds], "{:.3f}")
        after = spread([row["measured"][AFTER]["lenient_accuracy"] for row in seeds])
        rows.append([change.removeprefix("learning rate "), *reward, *after])
    titles = ["strict format reward, last ten steps", "±", "lenient accuracy, trained", "±"]
    return table(["learning rate", *titles], rows)


def trials() -> str:
    """Return means of steps 4 to 6 of 1.5B with three learning rates."""
    rows = []
    for name in TRIALS:
        rate = float(read(name, "record")["settings"]["learning_rate"])
        steps = read_lines(f"{name}/metrics.jsonl")[3:6]
        cells = [form.format(mean(step[key] for step in steps)) for key, form in TRIAL.values()]
        rows.append([f"{rate:.0e}".replace("e-0", "e-"), *cells])
    return table(["means of steps 4 to 6: learning rate", *TRIAL], rows)


def parts() -> str:
    """Return what each part of the recipe does: the laptop run with one thing changed."""
    rows = []
    for change, seeds in lines("parts").items():
        accuracy = spread([row["measured"][AFTER]["strict_accuracy"] for row in seeds])
        steps = [steps_until_format(row) for row in seeds]
        until = ["never", ""] if max(steps) > 60 else spread(steps, "{:.0f}")
        strict = spread([2 * at_the_end(row) for row in seeds], "{:.0%}")
        kl = "not measured"
        if any(any(row["curve"]["kl"]) for row in seeds):
            kl = f"{mean(at_the_end(row, 'kl') for row in seeds):.2f}"
        rows.append([change, *accuracy, *until, *strict, kl])
    titles = ["changed", "strict accuracy", "±", "steps until format", "±"]
    return table([*titles, "strict XML, last ten steps", "±", "KL"], rows)


def stops() -> str:
    """Return what wrong stop tokens do: trained laptop models, means over seeds."""
    rows = []
    for change, group in lines("stops").items():
        after = [run["measured"][AFTER] for run in group]
        measures = ("soft_format", "strict_format", "strict_accuracy", "truncated")
        cells = [f"{mean(row[measure] for row in after):.1%}" for measure in measures]
        reward = f"{mean(at_the_end(run) for run in group):.3f}"
        rows.append([change, len(group), *cells, reward])
    titles = ["soft format", "strict format", "strict accuracy", "truncated"]
    return table(["generation", "seeds", *titles, "strict format reward, last ten steps"], rows)


def updates() -> str:
    """Return what bf16 does to small updates: six steps, and how far the weights have moved."""
    rows = []
    for change, seeds in lines("updates").items():
        changed = mean(row["moved"]["changed"] for row in seeds)
        distance = mean(row["moved"]["distance"] for row in seeds)
        dtype, rate = change.split(", learning rate ")
        rows.append([dtype, rate, f"{changed:.1%}", f"{distance:.1e}"])
    return table(["weights, Adam's state", "learning rate", "weights changed", "distance"], rows)


def benchmark() -> str:
    """Return the time split of benchmark.md, and its GPU table if there is one."""
    _, *parts = Path(__file__).with_name("benchmark.md").read_text().split("### ")
    _, split, _, *gpu = [part.split("\n\n")[1].strip() for part in parts]
    return "\n\n".join([split, *gpu]) + "\n"


TABLES = {
    "results": lambda: results(FINDING),
    "sizes": lambda: results({what: list(MEASURED) for what in ALL_MEASURES}),
    "three": lambda: group(3),
    "evaluation": evaluation,
    "gains": gains,
    "course": lambda: course(LAPTOP),
    "passed": passed,
    "qwen_passed": lambda: qwen_passed(QWEN),
    "half_passed": lambda: qwen_passed(HALF_KL),
    "qwen_course": lambda: course(QWEN),
    "half_course": lambda: course(HALF),
    "tails": tails,
    "default_command": default_command,
    "reliability": reliability,
    "examples": examples,
    "group": group,
    "settings": settings,
    "trials": trials,
    "parts": parts,
    "updates": updates,
    "stops": stops,
    "benchmark": benchmark,
}


def cell(name: str, row: str, column: str) -> str:
    """Return a cell of a table by the beginning of its row and the title of its column."""
    text = TABLES[name]()
    titles = text.splitlines()[0][2:-2].split(" | ")
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
    return found[2:-2].split(" | ")[titles.index(column)]


CELLS = {  # README's numbers that stand in a table: its name, row, column
    "strict_first": ("course", "strict format reward, at most 0.5", "first"),
    "strict_last": ("course", "strict format reward, at most 0.5", "last"),
    "laptop_reasoning": ("results", "due to reasoning, points", LAPTOP_MEAN),
    "half_reasoning": ("results", "due to reasoning, points", HALF_B),
    "one_reasoning": ("results", "due to reasoning, points", ONE_B),
    "laptop_shot": ("results", "strict accuracy, untrained, one-shot", LAPTOP_MEAN),
    "one_shot": ("results", "strict accuracy, untrained, one-shot", ONE_B),
    "laptop_trained": ("results", "strict accuracy, trained", LAPTOP_MEAN),
    "one_trained": ("results", "strict accuracy, trained", ONE_B),
    "one_first": ("qwen_course", "strict format reward, at most 0.5", "first"),
    "one_last": ("qwen_course", "strict format reward, at most 0.5", "last"),
    "one_pass1": ("qwen_passed", "1", "trained, lenient"),
    "one_pass8": ("qwen_passed", "8", "trained, lenient"),
    "one_shot1": ("qwen_passed", "1", "untrained, one-shot, lenient"),
    "one_shot8": ("qwen_passed", "8", "untrained, one-shot, lenient"),
    "stray": ("tails", f"{code(STRAY)}, a second one", "trained, test answers"),
    "endless_soft": ("stops", "does not stop there", "soft format"),
    "endless_strict": ("stops", "does not stop there", "strict format"),
    "no_correctness": ("parts", WITHOUT, "strict accuracy"),
    "only_sampled": ("parts", "correctness only", "strict XML, last ten steps"),
    "moved_bf16": ("updates", "bfloat16 | 5e-6", "weights changed"),
    "moved_fp32": ("updates", "float32 | 5e-6", "weights changed"),
}


def numbers() -> dict[str, str]:
    """Return the numbers of README's findings by name."""
    found = {name: cell(*place) for name, place in CELLS.items()}
    only = lines("parts")["correctness only"]
    found["only_greedy"] = f"{mean(row['measured'][AFTER]['strict_format'] for row in only):.0%}"
    for name, when in {"shot": SHOT, "laptop": AFTER}.items():
        cells = pass_at_k(LAPTOP, when, "lenient")
        found |= {f"{name}_pass{k}": f"{mean_value(cells[k]):.1%}" for k in (1, 16)}
    alone = [row["measured"][AFTER]["strict_accuracy"] for row in lines("parts")[WITHOUT]]
    found["low_seed"], found["high_seed"] = (f"{end(alone):.1%}" for end in (min, max))
    found["half_strict"] = f"{values(HALF, AFTER, 'strict_format')[0]:.1%}"
    shares = {"laptop": LAPTOP, "half": HALF, "one": QWEN}
    shares = {name: time_shares(columns["seed 42"]) for name, columns in shares.items()}
    found |= {f"{name}_generate": f"{share['generate']:.0%}" for name, share in shares.items()}
    found["laptop_rewards"] = f"{shares['laptop']['five rewards']:.2%}"
    return found


def fill(page: str, named: dict[str, str]) -> str:
    """Return the text of a page with its tables, and its numbers by name, made anew."""
    for name, make in TABLES.items():
        start = f"<!-- {name} -->\n"
        end = f"<!-- /{name} -->"
        if end in page:
            before, _, rest = page.partition(start)
            page = before + start + make() + end + rest.partition(end)[2]
    for name, number in named.items():
        page = re.sub(rf"[-+.%\d]*<!--{name}-->", f"{number}<!--{name}-->", page)
    return page


def main() -> None:
    """Write tables and numbers into their pages; with `--check`, only say what would change."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--check", action="store_true", help="only name the files out of date")
    check = parser.parse_args().check
    named = numbers()
    pages = {path: path.read_text() for path in PAGES}
    shown = re.findall(r"<!--(?: /)?(\w+) ?-->", "".join(pages.values()))
    if lost := set(shown) ^ (TABLES.keys() | named.keys()):
        sys.exit(f"markers on a page or in tables.py, but not in both: {', '.join(sorted(lost))}")
    changed = {path: new for path, old in pages.items() if (new := fill(old, named)) != old}
    for path, text in changed.items():
        print("out of date:" if check else "wrote", path.relative_to(ROOT))
        if not check:
            path.write_text(text)
    if not changed:
        print("all tables and numbers are up to date")
    sys.exit(1 if check and changed else 0)


if __name__ == "__main__":
    main()
