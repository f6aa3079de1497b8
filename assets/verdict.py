"""Format or reasoning: shares with their intervals, and what of a gain in accuracy is which. No torch here."""

import math

from rewards import score


def figures(rows: list[dict]) -> dict[str, dict]:
    """One measurement (rows of `score`, `truncated`, `tokens`): value, n and 95% interval of each column.

    Wilson's interval (1927) for the shares, mean +- 1.96 standard errors for `tokens`.
    """
    n, z, result = len(rows), 1.96, {}
    for column in [*score("", ""), "truncated"]:
        p, zz = sum(row[column] for row in rows) / n, z * z / n
        centre, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
        result[column] = {"value": p, "n": n, "interval": [(centre - half) / (1 + zz), (centre + half) / (1 + zz)]}
    mean = sum(row["tokens"] for row in rows) / n
    half = z * math.sqrt(sum((row["tokens"] - mean) ** 2 for row in rows)) / n
    return result | {"tokens": {"value": mean, "n": n, "interval": [mean - half, mean + half]}}


def gain(column: str, before: list[dict], after: list[dict]) -> list[float]:
    """Difference of two shares on the same questions, and its paired 95% interval (Agresti and Min 2005)."""
    n, changes = len(before), [int(a[column]) - int(b[column]) for b, a in zip(before, after, strict=True)]
    centre = sum(changes) / (n + 2)
    half = 1.96 * math.sqrt(((sum(map(abs, changes)) + 1) / (n + 2) - centre**2) / (n + 2))
    return [sum(changes) / n, max(-1.0, centre - half), min(1.0, centre + half)]


def verdict(zero: list[dict], one: list[dict], after: list[dict], one_shot: bool = False) -> dict:
    """How much of the gain in strict accuracy is format and how much is reasoning, from the three measurements.

    `zero` and `one` are untrained, without and with an example in the prompt; `after` has the prompt of the training.
    Reasoning is lenient accuracy after training minus the better one of the two untrained: what the model can do now
    that no prompt brought out before. The rest of the gain is format: answers that were right but could not be read.
    Learned is what has its whole interval above zero; for the format that of the soft or that of the strict one.
    """

    def share(rows: list[dict], column: str) -> float:
        return 100 * sum(row[column] for row in rows) / len(rows)

    def points(difference: list[float]) -> str:
        return "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * x for x in difference))

    def went(column: str) -> str:
        ends = f"from {share(before, column):.1f}% to {share(after, column):.1f}%"
        return f"{column.replace('_', ' ')} went {ends}: {points(gain(column, before, after))}"

    lenient, forms = "lenient_accuracy", ("soft_format", "strict_format")
    prompt, best = max(("one-shot", one), ("zero-shot", zero), key=lambda x: share(x[1], lenient))
    before = one if one_shot else zero
    gains = {column: gain(column, before, after) for column in ("strict_accuracy", *forms)}
    gains["reasoning"] = reasoning = gain(lenient, best, after)
    gains["format"] = gains["strict_accuracy"][0] - reasoning[0]
    lows = {"format": max(gains[form][1] for form in forms), "reasoning": reasoning[1]}
    excludes = "does not exclude" if reasoning[1] <= 0 <= reasoning[2] else "excludes"
    sentences = [
        f"{went('strict_accuracy').capitalize()}; an example in the prompt gives {share(one, 'strict_accuracy'):.1f}% "
        "without training.",
        f"Reasoning: {points(reasoning)} of it, lenient accuracy from {share(best, lenient):.1f}% ({prompt}, the best "
        f"prompt before) to {share(after, lenient):.1f}%; the interval {excludes} zero.",
        f"Format: the other {100 * gains['format']:+.1f} points; " + "; ".join(map(went, forms)) + ".",
    ]
    learned = " and ".join(word for word, low in lows.items() if low > 0)
    return {"verdict": learned or "neither", "sentences": sentences, "gain": gains}
