"""The verdict on planted models, the intervals against their definitions, and what the evaluation keeps."""

import json
import math
import random

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_demo
from assets import tables
from assets.record import time_split
from assets.verdict import figures, gain, verdict
from rewards import score

XML = "<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n{}\n</answer>\n"


def planted(n: int, form: float, right: float, seed: int) -> list[dict]:
    """Completions of a model that writes XML in a share `form` of its answers and is right in a share `right`."""
    rng, rows = random.Random(seed), []
    skill = random.Random(99)  # the same questions are easy for every model
    for _ in range(n):
        answer = 18 if skill.random() < right else 17
        text = XML.format(answer) if rng.random() < form else f"The answer is {answer}."
        rows.append(score(text, "18") | {"truncated": False, "tokens": len(text)})
    return rows


def test_a_model_that_learned_the_format_only():
    result = verdict(planted(500, 0.05, 0.6, 1), planted(500, 0.7, 0.6, 2), planted(500, 0.98, 0.6, 3))
    assert result["verdict"] == "format"
    assert (
        result["gain"]["reasoning"][0] == 0 and result["gain"]["format"] == result["gain"]["strict_accuracy"][0] > 0.5
    )
    assert "does not exclude zero" in result["sentences"][1]


def test_a_model_that_learned_to_reason_only():
    result = verdict(planted(500, 0.9, 0.4, 1), planted(500, 0.9, 0.4, 2), planted(500, 0.9, 0.7, 1))
    assert result["verdict"] == "reasoning" and "the interval excludes zero" in result["sentences"][1]
    low, high = result["gain"]["reasoning"][1:]
    assert 0 < low < 0.3 < high


def test_a_model_that_learned_the_soft_format_only():
    after = [row | {"strict_format": False} for row in planted(500, 0.98, 0.6, 3)]  # a last newline is missing
    result = verdict(planted(500, 0.0, 0.6, 1), planted(500, 0.0, 0.6, 2), after)
    assert result["verdict"] == "format" and result["gain"]["strict_format"][0] == 0 < result["gain"]["soft_format"][1]


def test_both_and_neither():
    assert verdict(planted(500, 0.1, 0.4, 1), planted(500, 0.5, 0.4, 2), planted(500, 0.9, 0.7, 3))["verdict"] == "format and reasoning"  # fmt: skip # noqa: E501
    assert verdict(planted(500, 0.5, 0.4, 1), planted(500, 0.5, 0.4, 1), planted(500, 0.5, 0.4, 1))["verdict"] == "neither"  # fmt: skip # noqa: E501


def test_the_better_untrained_prompt_is_the_control():
    result = verdict(planted(500, 0.1, 0.3, 1), planted(500, 0.9, 0.6, 2), planted(500, 0.9, 0.6, 3))
    assert result["verdict"] == "format" and "one-shot" in result["sentences"][1]  # an example did as much untrained


def test_one_shot_training_starts_from_its_own_prompt():
    zero, one, after = planted(500, 0.1, 0.6, 1), planted(500, 0.7, 0.6, 2), planted(500, 0.98, 0.6, 3)
    result = verdict(zero, one, after, one_shot=True)
    assert result["gain"]["strict_accuracy"][0] == gain("strict_accuracy", one, after)[0] < 0.3


def test_what_was_lost_is_said():
    result = verdict(planted(500, 0.1, 0.8, 1), planted(500, 0.9, 0.8, 2), planted(500, 0.99, 0.6, 3))
    assert result["verdict"] == "format" and result["gain"]["reasoning"][2] < 0
    assert "-20" in result["sentences"][1] and "the interval excludes zero" in result["sentences"][1]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=400))
def test_paired_interval(pairs):
    before, after = ([{"x": p[i]} for p in pairs] for i in (0, 1))
    value, low, high = gain("x", before, after)
    assert value == pytest.approx(sum(b - a for a, b in pairs) / len(pairs))
    assert -1 <= low <= high <= 1
    backwards = gain("x", after, before)
    assert backwards == pytest.approx([-value, -high, -low])


def test_paired_interval_covers():
    """95% of such intervals hold the true difference (here 0.1), within 2 points, over 2,000 simulated evaluations."""
    rng, held = random.Random(0), 0
    for _ in range(2000):
        draws = [rng.random() for _ in range(200)]
        before, after = [{"x": d < 0.4} for d in draws], [{"x": 0.05 < d < 0.55} for d in draws]
        held += gain("x", before, after)[1] <= 0.1 <= gain("x", before, after)[2]
    print(f"coverage {held / 2000:.3f}")
    assert 0.93 <= held / 2000 <= 0.97


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson(k, n, low, high):
    rows = [score(XML.format(18) if i < k else "no", "18") | {"truncated": False, "tokens": i} for i in range(n)]
    found = figures(rows)["strict_accuracy"]
    assert (found["value"], found["n"]) == (k / n, n)
    assert found["interval"] == pytest.approx([low, high], abs=1e-4)  # the published values
    tokens = figures(rows)["tokens"]
    half = 1.96 * math.sqrt(sum((i - tokens["value"]) ** 2 for i in range(n)) / n) / math.sqrt(n)
    assert tokens["interval"] == pytest.approx([tokens["value"] - half, tokens["value"] + half])


def test_evaluate_is_greedy_repeatable_and_kept(tmp_path):
    flags = f"--config assets/tiny/config.yaml --output_dir {tmp_path} --report_to none --per_device_eval_batch_size 8"
    args, model_args = grpo_demo.parse_args(flags.split())
    model, tokenizer = grpo_demo.load_model(args, model_args)
    rows = grpo_demo.get_gsm8k_questions("test", "assets/tiny").select(range(20))
    first = grpo_demo.evaluate(model, tokenizer, rows, args, "before_zero_shot")
    assert [r["question"] for r in first] == rows["question"][:] and [r["gold"] for r in first] == rows["answer"][:]
    for row in first:
        assert {k: row[k] for k in score("", "")} == score(row["completion"], row["gold"])
        ids = tokenizer(row["completion"])["input_ids"]
        assert row["truncated"] is False and row["tokens"] == len(ids) + 1  # and the end-of-turn token
    args.per_device_eval_batch_size, kept = 3, tmp_path / "evaluation" / "before_zero_shot.parquet"
    again = grpo_demo.evaluate(model, tokenizer, rows, args, "again")
    assert [r["completion"] for r in again] == [r["completion"] for r in first]  # whatever the batch
    written = kept.stat().st_mtime_ns
    assert grpo_demo.evaluate(None, None, rows, args, "before_zero_shot") == first  # read, not made again
    assert kept.stat().st_mtime_ns == written
    args.max_completion_length = 4
    assert all(r["truncated"] and r["tokens"] == 4 for r in grpo_demo.evaluate(model, tokenizer, rows, args, "cut"))


def test_readme_shows_the_records():
    """README's tables are the ones that the records give."""
    readme = (ROOT / "README.md").read_text()
    for make in tables.TABLES:
        assert f"<!-- {make.__name__} -->\n{make()}<!-- /{make.__name__} -->" in readme
    assert json.loads((ROOT / "assets/runs/laptop-42/record.json").read_text())["versions"]["trl"] == "1.16.0"


def test_readme_sentences_follow_from_the_records():
    """Numbers of README's sentences that no table shows, recomputed from the laptop runs."""
    evaluations, runs, _ = zip(*tables.runs(tables.LAPTOP), strict=True)

    def means(key: str, steps: slice, scale: float = 1.0) -> list[float]:
        return [scale * sum(m[key] for m in run[steps]) / len(run[steps]) for run in runs]

    xml, last = "rewards/strict_format_reward_func/mean", slice(-10, None)
    early, late = means(xml, slice(0, 5), 200), means(xml, last, 200)
    wide = [m["reward_std"] for run in runs for m in run[last]]
    before, one_shot, after = (
        [e["measurements"][when]["tokens"]["value"] for e in evaluations] for when in tables.MEASURED
    )
    assert round(min(early)) == round(max(early)) and not any(m["clip_ratio/region_mean"] for r in runs for m in r)
    readme = " ".join((ROOT / "README.md").read_text().split())
    for sentence in (
        f"some {early[0]:.0f}% of the completions are strict XML in the first five steps and",
        f"and {min(late):.0f} to {max(late):.0f}% in the last ten",
        f"grows from {before[0]:.1f} tokens to {min(after):.1f} to {max(after):.1f}.",
        f"answers in XML, one-shot, have {one_shot[0]:.1f}.",
        f"({min(wide):.1f} to {max(wide):.1f} in the last ten steps of the laptop runs)",
    ):
        assert sentence in readme


def test_readme_sentences_on_qwen_follow_from_its_record():
    ((evaluation, metrics, record),) = tables.runs(tables.QWEN)
    folder = ROOT / "assets/runs/qwen-half-b"
    ends, samples, timers = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("endings", "samples", "timers")
    )
    before, _, after = (
        {k: v["value"] for k, v in evaluation["measurements"][when].items()} for when in tables.MEASURED
    )
    control = json.loads((ROOT / "assets/runs/qwen-no-xmlcount/endings.json").read_text())
    stray, gone = (
        [[run[f"step {i}"].get(tail, 0) for tail in tables.STRAY] for i in range(1, n)]
        for run, n in ((ends, 61), (control, 15))
    )
    (last,) = (ROOT / "assets/runs/qwen-no-xmlcount/metrics.jsonl").read_text().splitlines()[13:]
    newline = sum(ends[f"step {step}"].get("\n", 0) for step in range(1, 61))
    right = [round(8 * m["accuracy/lenient"]) for m in metrics]
    soft = [m["rewards/soft_format_reward_func/mean"] * 2 for m in metrics]
    shown = [
        tables.interval(evaluation["measurements"][f"{w}_zero_shot"]["strict_accuracy"]) for w in ("before", "after")
    ]
    parts = time_split(metrics, timers)
    step = sum(parts.values())
    failure = next(s for s in samples if s["xmlcount_reward_func"] == -0.45)
    assert record["resumed"] == 9 and min(soft[:7]) == 0 and max(soft[:7]) < soft[7] == 1
    assert before["lenient_accuracy"] == after["lenient_accuracy"] == after["strict_accuracy"]
    assert stray[:5] == gone[:5] == [[0, 0], [0, 0], [0, 0], [0, 1], [0, 0]] and sum(right[46:]) == 0
    assert json.loads(last)["rewards/soft_format_reward_func/mean"] == 0.5 * 7 / 8
    readme = " ".join((ROOT / "README.md").read_text().split())
    for sentence in (
        f"strict accuracy {shown[0]} before and {shown[1]} after, lenient accuracy {shown[1]} both times",
        f"A step took {step:.0f} s. The run was stopped nine times",
        "all eight completions have the soft format for the first time",
        f"from step 21 on {sum(soft[20:]) / 40:.0%} of them",
        f"takes {parts['generate'] / step:.0%} of a step at this size, the five rewards "
        f"{100 * parts['five rewards'] / step:.2g}%",
        f"{(len(failure['completion']) - 1) / 1000} in the [early failure]",
        f"1 of the first 40 completions, {stray[5][1]} of 8 at step 6.",
        f"in {stray[7][0]} of 8 at step 8 it is a second one",
        f"but {newline} of 480 completions ended so",
        f"{sum(map(sum, gone[5:]))} of the 72 completions of steps 6 to 14 end in `</reasoning>`, with xmlcount "
        f"{sum(map(sum, stray[5:14]))} of 72",
        f"{sum(right[:46])} of the first 368 are right in any form and none of the last 112",
        f"are shorter ({after['tokens']:.0f} tokens, before {before['tokens']:.0f})",
    ):
        assert sentence in readme
