"""pass@k: is one of k sampled answers right? Needed with `--eval_generations` only."""

import math

from assets.evaluate import mean_interval


def report(sampled: dict[str, list[dict]], n: int) -> tuple[dict, str]:
    """Return a summary of n sampled answers a question, and it as text; name -> answers."""
    passed = {name: summarize_samples(answers, n) for name, answers in sampled.items()}
    lines = table(passed) + ([explain(passed)] if len(passed) == 3 else [])
    return passed, "\n".join(lines)


def pass_at_k(k: int, n: int, right: int) -> float:
    """Return the chance that k of n samples, `right` of them right, hold a right one.

    Unbiased for pass@k. Source: Chen et al. 2021, arXiv 2107.03374.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def summarize_samples(answers: list[dict], n: int) -> dict[str, dict[int, dict]]:
    """Return pass@k for k = 1, 2, 4, ... n: kind of accuracy -> k -> mean over the questions.

    answers  n sampled answers to each question, in a row; `n` of a mean is that number too
    """
    result = {}
    for kind in ("strict_accuracy", "lenient_accuracy"):
        groups = [answers[i : i + n] for i in range(0, len(answers), n)]
        right = [sum(answer[kind] for answer in group) for group in groups]
        result[kind] = {}
        for k in (2**i for i in range(n.bit_length())):
            cell = mean_interval([pass_at_k(k, n, count) for count in right])
            low, high = max(0.0, cell["low"]), min(1.0, cell["high"])
            result[kind][k] = cell | {"n": n, "low": low, "high": high}
    return result


def table(passed: dict[str, dict]) -> list[str]:
    """Return lines of pass@k: a row for each k, two columns for each measurement."""
    columns = [cells for kinds in passed.values() for cells in kinds.values()]
    lines = ["\npass@k " + "".join(f"{name.replace('_', ' '):>24}" for name in passed)]
    lines += ["       " + f"{'strict':>12}{'lenient':>12}" * len(passed)]
    for k in columns[0]:
        lines += [f"k = {k:<3}" + "".join(f"{cells[k]['value']:>12.1%}" for cells in columns)]
    return lines


def explain(passed: dict[str, dict]) -> str:
    """Return what pass@k says of training: more answers, or likelier ones? A sentence.

    passed  name of the measurement -> kind -> k -> value; the last measurement is the trained model
    """
    *untrained, trained = (kinds["lenient_accuracy"] for kinds in passed.values())
    best = max(untrained, key=lambda cells: cells[1]["value"])
    one, n = trained[1]["value"], max(trained)
    k = next((k for k, cell in best.items() if cell["value"] >= one), None)
    enough = {None: f"with {n} not yet", 1: "with one too"}.get(k, f"with {k} samples")
    return (
        f"pass@k: with one sampled answer the trained model is right in {one:.1%} (lenient), the "
        f"untrained one reaches that {enough}; with {n} it is {trained[n]['value']:.1%} trained, "
        f"{best[n]['value']:.1%} untrained."
    )
