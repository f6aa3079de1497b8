"""What answers are worth: shares and means with 95% intervals, and the rule of the verdict."""

import math

from rewards import score

Z = 1.96  # 95% intervals
COLUMNS = [*score("", ""), "truncated", "tokens"]


def share(rows: list[dict], column: str) -> float:
    """Return the share of rows in which `column` is true, from 0 to 1."""
    return sum(row[column] for row in rows) / len(rows)


def mean(values: list[float]) -> dict:
    """Return value, n and 95% interval of a mean: +- 1.96 standard errors."""
    n, value = len(values), sum(values) / len(values)
    half = Z * math.sqrt(sum((x - value) ** 2 for x in values)) / n
    return {"value": value, "n": n, "interval": [value - half, value + half]}


def summarize(rows: list[dict]) -> dict[str, dict]:
    """Return value, n and 95% interval of each column of one measurement.

    Wilson's interval (1927) for shares; mean +- 1.96 standard errors for `tokens`.
    """
    n, result = len(rows), {}
    for column in COLUMNS[:-1]:
        p, zz = share(rows, column), Z * Z / n
        center, half = p + zz / 2, Z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
        interval = [(center - half) / (1 + zz), (center + half) / (1 + zz)]
        result[column] = {"value": p, "n": n, "interval": interval}
    return result | {"tokens": mean([row["tokens"] for row in rows])}


def gain(column: str, before: list[dict], after: list[dict]) -> list[float]:
    """Return the difference of two shares on the same questions, and its paired 95% interval.

    Source: Agresti and Min 2005.
    """
    changes = [int(a[column]) - int(b[column]) for b, a in zip(before, after, strict=True)]
    n = len(changes)
    center = sum(changes) / (n + 2)
    half = Z * math.sqrt(((sum(map(abs, changes)) + 1) / (n + 2) - center**2) / (n + 2))
    return [sum(changes) / n, max(-1.0, center - half), min(1.0, center + half)]


def verdict(*, before: list[dict], control: list[dict], after: list[dict]) -> dict:
    """Say how much of the gain in strict accuracy is due to format and how much to reasoning.

    before   the untrained model with the prompt used in training
    control  the untrained model with the other prompt: with an example, or without one
    after    the trained model

    Reasoning is the gain in lenient accuracy over the better of the two untrained prompts. Format
    is the rest: answers that were right but not in tags. A part counts as learned if its 95%
    interval lies above zero; for the format, that of soft or strict format.
    """
    columns = ("strict_accuracy", "soft_format", "strict_format")
    gains = {column: gain(column, before, after) for column in columns}
    lenient = [share(rows, "lenient_accuracy") for rows in (before, control)]
    best = before if lenient[0] > lenient[1] else control
    gains["reasoning"] = gain("lenient_accuracy", best, after)
    gains["format"] = gains["strict_accuracy"][0] - gains["reasoning"][0]
    lows = {
        "format": max(gains["soft_format"][1], gains["strict_format"][1]),
        "reasoning": gains["reasoning"][1],
    }
    learned = " and ".join(part for part, low in lows.items() if low > 0) or "neither"
    return {"verdict": learned, "gain": gains, "best_untrained": max(lenient)}


def explain(result: dict, measurements: dict[str, dict]) -> list[str]:
    """Return the verdict in three sentences; `measurements` are those of `evaluation.json`."""
    after = list(measurements)[-1]
    before = after.replace("after", "before")

    def went(column: str, gain: str, start: float | None = None) -> str:
        shares = [measurements[name][column]["value"] for name in (before, after)]
        points = "{:+.1f} points [{:+.1f}, {:+.1f}]".format(
            *(100 * x for x in result["gain"][gain])
        )
        return f"{shares[0] if start is None else start:.1%} to {shares[1]:.1%} ({points})"

    shot = measurements["before_one_shot"]["strict_accuracy"]["value"]
    form = 100 * result["gain"]["format"]
    return [
        f"Strict accuracy: {went('strict_accuracy', 'strict_accuracy')}; "
        f"untrained, with one example in the prompt: {shot:.1%}.",
        "Due to reasoning: lenient accuracy from the better untrained prompt, "
        f"{went('lenient_accuracy', 'reasoning', result['best_untrained'])}.",
        f"Due to format: the rest, {form:+.1f} points; "
        f"soft format {went('soft_format', 'soft_format')}, "
        f"strict format {went('strict_format', 'strict_format')}.",
    ]


def pass_at(k: int, n: int, right: int) -> float:
    """Return the chance that k of n samples, `right` of them right, hold a right one.

    Unbiased for pass@k. Source: Chen et al. 2021, arXiv 2107.03374.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def summarize_samples(rows: list[dict], n: int) -> dict[str, dict[int, dict]]:
    """Return pass@k for k = 1, 2, 4, ... n: kind -> k -> mean over the questions, 95% interval.

    rows  n sampled answers to each question, in a row; `n` of a cell is that number too
    """
    result = {}
    for kind in ("strict_accuracy", "lenient_accuracy"):
        right = [sum(row[kind] for row in rows[i : i + n]) for i in range(0, len(rows), n)]
        result[kind] = {}
        for k in (2**i for i in range(n.bit_length())):
            cell = mean([pass_at(k, n, count) for count in right])
            low, high = cell["interval"]
            result[kind][k] = cell | {"n": n, "interval": [max(0.0, low), min(1.0, high)]}
    return result


def pass_table(passed: dict[str, dict]) -> list[str]:
    """Return lines of pass@k: a row for each k, two columns for each measurement."""
    cells = {name: list(kinds.values()) for name, kinds in passed.items()}
    lines = ["\npass@k " + "".join(f"{name.replace('_', ' '):>24}" for name in cells)]
    lines += ["       " + f"{'strict':>12}{'lenient':>12}" * len(cells)]
    for k in next(iter(cells.values()))[0]:
        shares = [column[k]["value"] for columns in cells.values() for column in columns]
        lines += [f"k = {k:<3}" + "".join(f"{share:>12.1%}" for share in shares)]
    return lines


def sharpening(passed: dict[str, dict]) -> str:
    """Return what pass@k says of training: more answers, or likelier ones? A sentence.

    passed  name of the measurement -> kind -> k -> value; the last measurement is the trained model
    """
    *untrained, trained = (kinds["lenient_accuracy"] for kinds in passed.values())
    best = max(untrained, key=lambda cells: cells[1]["value"])
    one, n = trained[1]["value"], max(trained)
    k = next((k for k, cell in best.items() if cell["value"] >= one), 0)
    enough = f"with {k} samples" if k > 1 else "with one too" if k else f"with {n} not yet"
    return (
        f"pass@k: with one sampled answer the trained model is right in {one:.1%} (lenient), the "
        f"untrained one reaches that {enough}; with {n} it is {trained[n]['value']:.1%} trained, "
        f"{best[n]['value']:.1%} untrained."
    )


def table(measurements: dict[str, dict], form: str) -> list[list[str]]:
    """Return the texts of a table: a header, then each figure in `form`, with its interval."""
    (n,) = {m["soft_format"]["n"] for m in measurements.values()}
    rows = [[f"{n} questions", *(name.replace("_", " ") for name in measurements)]]
    for column in COLUMNS:
        cells = [m[column] for m in measurements.values()]
        unit = form.replace("%", "f") if column == "tokens" else form
        texts = [unit.format(cell["value"], *cell["interval"]) for cell in cells]
        rows += [[column.replace("_", " "), *texts]]
    return rows
