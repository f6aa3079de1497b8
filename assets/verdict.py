"""What answers are worth: shares and means with 95% intervals, the rule of the verdict."""

import math
from typing import TypedDict

from rewards import score

Z = 1.96  # 95% intervals
MEASURES = [*score("", ""), "truncated", "tokens"]


class Interval(TypedDict):
    """A share (0 to 1), a mean or a difference of shares, of `n` questions; its 95% interval."""

    value: float
    n: int
    low: float
    high: float


class Answer(TypedDict):
    """A model's answer to a question, as kept in `evaluation/*.parquet`."""

    question: str
    gold: str
    completion: str
    tokens: int  # with the token that ends the text
    truncated: bool  # no end within the limit
    stray: str  # the first special token before the end, or ''
    strict_format: bool
    soft_format: bool
    strict_accuracy: bool
    lenient_accuracy: bool


def share(answers: list[Answer], measure: str) -> float:
    """Return the share of answers for which `measure` is true, from 0 to 1."""
    return sum(answer[measure] for answer in answers) / len(answers)


def share_interval(answers: list[Answer], measure: str) -> Interval:
    """Return that share with Wilson's interval (1927)."""
    n, p = len(answers), share(answers, measure)
    zz = Z * Z / n
    center = p + zz / 2
    half = Z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return Interval(value=p, n=n, low=(center - half) / (1 + zz), high=(center + half) / (1 + zz))


def mean_interval(values: list[float]) -> Interval:
    """Return a mean with its interval: +- 1.96 standard errors."""
    n = len(values)
    mean = sum(values) / n
    half = Z * math.sqrt(sum((x - mean) ** 2 for x in values)) / n
    return Interval(value=mean, n=n, low=mean - half, high=mean + half)


def paired_interval(measure: str, before: list[Answer], after: list[Answer]) -> Interval:
    """Return the difference of two shares on the same questions, with its paired interval.

    Source: Agresti and Min 2005.
    """
    changes = [int(a[measure]) - int(b[measure]) for b, a in zip(before, after, strict=True)]
    n = len(changes)
    center = sum(changes) / (n + 2)
    half = Z * math.sqrt(((sum(map(abs, changes)) + 1) / (n + 2) - center**2) / (n + 2))
    low, high = max(-1.0, center - half), min(1.0, center + half)
    return Interval(value=sum(changes) / n, n=n, low=low, high=high)


def summarize(answers: list[Answer]) -> dict[str, Interval]:
    """Return each figure of one measurement: five shares, and the mean of `tokens`."""
    shares = {measure: share_interval(answers, measure) for measure in MEASURES[:-1]}
    return shares | {"tokens": mean_interval([answer["tokens"] for answer in answers])}


def decide(*, before: list[Answer], control: list[Answer], after: list[Answer]) -> dict:
    """Return how much of the gain in strict accuracy is due to format and how much to reasoning.

    before   the untrained model with the prompt used in training
    control  the untrained model with the other prompt: with an example, or without one
    after    the trained model

    Reasoning is the gain in lenient accuracy over the better of the two untrained prompts. Format
    is the rest: answers that were right but not in tags. A part counts as learned if its 95%
    interval lies above zero; for the format, that of soft or strict format.

    Returns "verdict" (text), "gain" (name -> Interval; "format" is a number) and "best_untrained".
    """
    measures = ("strict_accuracy", "soft_format", "strict_format")
    gains = {measure: paired_interval(measure, before, after) for measure in measures}
    best = max(control, before, key=lambda answers: share(answers, "lenient_accuracy"))
    gains["reasoning"] = paired_interval("lenient_accuracy", best, after)
    gains["format"] = gains["strict_accuracy"]["value"] - gains["reasoning"]["value"]
    format_low = max(gains["soft_format"]["low"], gains["strict_format"]["low"])
    lows = {"format": format_low, "reasoning": gains["reasoning"]["low"]}
    verdict = " and ".join(part for part, low in lows.items() if low > 0) or "neither"
    return {"verdict": verdict, "gain": gains, "best_untrained": share(best, "lenient_accuracy")}


def explain(result: dict, measurements: dict[str, dict[str, Interval]]) -> list[str]:
    """Return the verdict in three sentences; `measurements` are those of `evaluation.json`."""
    after = list(measurements)[-1]
    before = after.replace("after", "before")

    def change(measure: str, gain: str, start: float | None = None) -> str:
        start = measurements[before][measure]["value"] if start is None else start
        end = measurements[after][measure]["value"]
        points = [f"{100 * result['gain'][gain][key]:+.1f}" for key in ("value", "low", "high")]
        return f"{start:.1%} to {end:.1%} ({points[0]} points [{points[1]}, {points[2]}])"

    shot = measurements["before_one_shot"]["strict_accuracy"]["value"]
    return [
        f"Strict accuracy: {change('strict_accuracy', 'strict_accuracy')}; "
        f"untrained, with one example in the prompt: {shot:.1%}.",
        "Due to reasoning: lenient accuracy from the better untrained prompt, "
        f"{change('lenient_accuracy', 'reasoning', result['best_untrained'])}.",
        f"Due to format: the rest, {100 * result['gain']['format']:+.1f} points; "
        f"soft format {change('soft_format', 'soft_format')}, "
        f"strict format {change('strict_format', 'strict_format')}.",
    ]


def table(measurements: dict[str, dict[str, Interval]], form: str) -> list[list[str]]:
    """Return the texts of a table: a header, then each figure in `form`: value, low, high."""
    (n,) = {figures["soft_format"]["n"] for figures in measurements.values()}
    rows = [[f"{n} questions", *(name.replace("_", " ") for name in measurements)]]
    for measure in MEASURES:
        unit = form.replace("%", "f") if measure == "tokens" else form
        texts = [unit.format(**figures[measure]) for figures in measurements.values()]
        rows += [[measure.replace("_", " "), *texts]]
    return rows
