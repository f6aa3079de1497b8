"""README's tables, from the records in assets/runs.

python assets/tables.py        # writes them into README.md
"""

import json
import re
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEEDS = [42, 1, 2]
MEASURED = ["before_zero_shot", "before_one_shot", "after_zero_shot"]


def runs() -> list[tuple[dict, list[dict], dict]]:
    """Evaluation, metrics of each step, record; a run a seed."""
    folders = [HERE / "runs" / f"laptop-{seed}" for seed in SEEDS]
    return [
        (
            json.loads((f / "evaluation.json").read_text()),
            [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()],
            json.loads((f / "record.json").read_text()),
        )
        for f in folders
    ]


def results() -> str:
    """The laptop run at three seeds, with 95% intervals."""
    lines = [
        f"| laptop run, 512 test questions | {' | '.join(f'seed {s}' for s in SEEDS)} |",
        "|---|" + "---|" * len(SEEDS),
    ]

    def row(title: str, cells) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} |")

    def share(evaluation: dict, when: str, what: str) -> str:
        figure = evaluation["measurements"][when][what]
        return "{:.1%} [{:.1%}, {:.1%}]".format(figure["value"], *figure["interval"])

    for what in ("strict_format", "strict_accuracy", "lenient_accuracy"):
        for when in MEASURED:
            title = f"{what.replace('_', ' ')}, {when.split('_', 1)[0]}{' (one-shot)' if 'one' in when else ''}"
            row(title, [share(e, when, what) for e, _, _ in runs()])
    points = "{:+.1f} [{:+.1f}, {:+.1f}]"
    row(
        "gain in strict accuracy, points",
        [points.format(*(100 * x for x in e["gain"]["strict_accuracy"])) for e, _, _ in runs()],
    )
    row("of it reasoning", [points.format(*(100 * x for x in e["gain"]["reasoning"])) for e, _, _ in runs()])
    row("of it format", [f"{100 * e['gain']['format']:+.1f}" for e, _, _ in runs()])
    row("**verdict**", [f"**{e['verdict']}**" for e, _, _ in runs()])
    for name, title in (
        ("soft_format", "soft format reward"),
        ("strict_format", "strict format reward"),
        ("xmlcount", "xmlcount reward"),
        ("simple_correctness", "correctness reward"),
    ):
        values = [[m[f"rewards/{name}_reward_func/mean"] for m in metrics] for _, metrics, _ in runs()]
        row(f"{title}, first and last 10 steps", [f"{sum(v[:10]) / 10:.3f}, {sum(v[-10:]) / 10:.3f}" for v in values])
    row("seconds from the first step to the verdict", [f"{record['seconds']:.0f}" for _, _, record in runs()])
    return "\n".join(lines) + "\n"


def reliability() -> str:
    """What tests/test_nothing_lost.py did, from the rows it wrote.

    RELIABILITY=assets/runs/reliability.jsonl python -m pytest tests/test_nothing_lost.py
    """
    rows = [json.loads(line) for line in (HERE / "runs" / "reliability.jsonl").read_text().splitlines()]
    lines = ["| fault | tried | recovered | steps lost |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def benchmark() -> str:
    """What assets/benchmark.md says of the laptop: its first two tables and what follows from them."""
    first, second = (HERE / "benchmark.md").read_text().split("### ")[1:3]
    split = {line.split(" | ")[0].strip("| "): line.strip(" |").split(" | ")[1:] for line in second.splitlines()[2:]}
    share = [cell.split(", ")[1] for cell in split["generate"]]
    text = f"One generate call of 64 in the place of the gist's four takes generation from {share[2]} of a step to "
    text += f"{share[0]}, and an hour holds {split['steps an hour'][0]} steps instead of {split['steps an hour'][2]}. "
    text += f"The five rewards are {split['five rewards'][0].split(', ')[1]} of a step."
    tables = [table.partition("\n\n")[2].strip() for table in (first, second)]
    return "\n".join([*textwrap.wrap(text, 120), "", tables[0], "", tables[1], ""])


def main() -> None:
    path = HERE.parent / "README.md"
    text = path.read_text()
    for name, table in (("results", results()), ("benchmark", benchmark()), ("reliability", reliability())):
        text = re.sub(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->",
            lambda _, n=name, t=table: f"<!-- {n} -->\n{t}<!-- /{n} -->",
            text,
            flags=re.DOTALL,
        )
    path.write_text(text)


if __name__ == "__main__":
    main()
