"""The verdict on planted models, the intervals, what the evaluation keeps, the records."""

import itertools
import json
import random
import re
import statistics

import pytest
from conftest import LAPTOP, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_demo
from assets import evaluate, pass_at_k
from assets.evaluate import Evaluation, generate
from assets.pass_at_k import summarize_samples
from assets.research import tables
from assets.verdict import MEASURES, decide, explain, paired_interval, share, summarize
from rewards import REWARD_FUNCS, score

XML = "<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n{}\n</answer>\n"
SCORES = list(score("", ""))


def planted(form: float, right: float, seed: int, n: int = 500) -> list[dict]:
    """Return the rows of a model that writes XML in a share `form` and is right in `right`."""
    rows = []
    rng = random.Random(seed)
    skill = random.Random(99)  # the same questions are easy for every model
    for _ in range(n):
        answer = 18 if skill.random() < right else 17
        text = XML.format(answer) if rng.random() < form else f"The answer is {answer}."
        row = {"completion": text, "truncated": False, "tokens": len(text)}
        rows.append(row | score(text, "18"))
    return rows


def numbers(interval: dict) -> list[float]:
    """Return value, low and high of an interval."""
    return [interval[key] for key in ("value", "low", "high")]


def judge(before: tuple, control: tuple, after: tuple) -> dict:
    """Return the verdict on three planted models, each (form, right)."""
    rows = [planted(*model, seed) for seed, model in enumerate((before, control, after))]
    return decide(before=rows[0], control=rows[1], after=rows[2])


def test_a_model_that_learned_the_format_only():
    result = judge((0.05, 0.6), (0.7, 0.6), (0.98, 0.6))
    value, low, high = numbers(result["gain"]["reasoning"])
    assert result["verdict"] == "format" and low < value == 0 < high
    assert result["gain"]["format"] == result["gain"]["strict_accuracy"]["value"] > 0.5


def test_a_model_that_learned_to_reason_only():
    same_form = planted(0.9, 0.7, seed=0)  # the same answers in XML as before
    before, control = (planted(0.9, 0.4, seed) for seed in (0, 1))
    result = decide(before=before, control=control, after=same_form)
    assert result["verdict"] == "reasoning"
    _, low, high = numbers(result["gain"]["reasoning"])
    assert 0 < low < 0.3 < high


def test_a_model_that_learned_the_soft_format_only():
    before, control = (planted(0.0, 0.6, seed) for seed in (1, 2))
    after = [row | {"strict_format": False} for row in planted(0.98, 0.6, seed=3)]
    result = decide(before=before, control=control, after=after)
    assert result["verdict"] == "format"
    gains = result["gain"]
    assert gains["strict_format"]["value"] == 0 < gains["soft_format"]["low"]


def test_both_and_neither():
    assert judge((0.1, 0.4), (0.5, 0.4), (0.9, 0.7))["verdict"] == "format and reasoning"
    model = planted(0.5, 0.4, seed=1)
    assert decide(before=model, control=model, after=model)["verdict"] == "neither"


def test_reasoning_is_measured_from_the_better_untrained_prompt():
    better_control = judge((0.1, 0.3), (0.9, 0.6), (0.9, 0.6))
    better_before = judge((0.1, 0.6), (0.9, 0.3), (0.9, 0.6))
    for result in (better_control, better_before):
        assert result["verdict"] == "format" and result["gain"]["reasoning"]["value"] == 0
        assert result["best_untrained"] == share(planted(0.0, 0.6, seed=1), "lenient_accuracy")


def test_what_was_lost_is_negative():
    result = judge((0.1, 0.8), (0.9, 0.8), (0.99, 0.6))
    value, low, high = numbers(result["gain"]["reasoning"])
    assert result["verdict"] == "format" and low < value < high < 0
    total = result["gain"]["format"] + value
    assert result["gain"]["strict_accuracy"]["value"] == pytest.approx(total)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=400))
def test_paired_interval(pairs):
    before, after = ([{"x": pair[i]} for pair in pairs] for i in (0, 1))
    found = paired_interval("x", before, after)
    value, low, high = numbers(found)
    assert value == pytest.approx(share(after, "x") - share(before, "x"))
    assert -1 <= low <= high <= 1 and found["n"] == len(pairs)
    assert numbers(paired_interval("x", after, before)) == pytest.approx([-value, -high, -low])


def test_paired_interval_covers():
    """95% of such intervals hold the true difference, here 0.1, in 2,000 evaluations."""
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        draws = [rng.random() for _ in range(200)]
        before = [{"x": draw < 0.4} for draw in draws]
        after = [{"x": 0.05 < draw < 0.55} for draw in draws]
        _, low, high = numbers(paired_interval("x", before, after))
        held += low <= 0.1 <= high
    print(f"coverage {held / 2000:.3f}")
    assert 0.93 <= held / 2000 <= 0.97


@pytest.mark.parametrize(  # published values
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)],
)
def test_wilson_interval(k, n, low, high):
    texts = [XML.format(18) if i < k else "no" for i in range(n)]
    rows = [score(text, "18") | {"truncated": False, "tokens": 1} for text in texts]
    found = summarize(rows)["strict_accuracy"]
    assert (found["value"], found["n"]) == (k / n, n)
    assert numbers(found) == pytest.approx([k / n, low, high], abs=1e-4)


def test_interval_of_tokens():
    lengths = [3, 5, 5, 8, 21]
    rows = [score("", "") | {"truncated": False, "tokens": n} for n in lengths]
    normal = statistics.NormalDist(statistics.fmean(lengths), statistics.pstdev(lengths) / 5**0.5)
    wanted = [normal.mean, normal.inv_cdf(0.025), normal.inv_cdf(0.975)]
    found = summarize(rows)["tokens"]
    assert numbers(found) == pytest.approx(wanted, rel=1e-4) and found["n"] == 5


def build(out, *flags: str) -> tuple:
    """Return evaluation and trainer of the laptop run on its first 12 questions."""
    flags = ("--report_to", "none", "--eval_samples", "12", "--beta", "0", *flags)
    args, model_args = grpo_demo.parse_args([*LAPTOP, "--output_dir", str(out), *flags])
    evaluation = grpo_demo.build_evaluation(args, model_args)
    return evaluation, grpo_demo.prepare_trainer(args, model_args, evaluation.rows)


def test_evaluate_is_greedy_and_repeatable(tmp_path):
    evaluation, trainer = build(tmp_path / "a", "--per_device_eval_batch_size", "8")
    state = grpo_demo.torch.get_rng_state()
    first = evaluation.evaluate(trainer, "before_zero_shot", one_shot=False)
    assert grpo_demo.torch.equal(grpo_demo.torch.get_rng_state(), state)
    assert [row["question"] for row in first] == evaluation.rows["question"][:]
    assert [row["gold"] for row in first] == evaluation.rows["answer"][:]
    for row in first:
        assert {name: row[name] for name in SCORES} == score(row["completion"], row["gold"])
        ids = trainer.processing_class(row["completion"])["input_ids"]
        assert row["truncated"] is False and row["tokens"] == len(ids) + 1  # and the end of turn
    one_shot = evaluation.evaluate(trainer, "before_one_shot", one_shot=True)
    assert share(one_shot, "strict_format") > share(first, "strict_format")
    again = Evaluation.evaluate(
        *build(tmp_path / "b", "--per_device_eval_batch_size", "5"), "b", False
    )
    assert [row["completion"] for row in again] == [row["completion"] for row in first]


def test_a_long_answer_is_cut(tmp_path):
    rows = Evaluation.evaluate(*build(tmp_path, "--max_completion_length", "4"), "cut", False)
    assert all(row["truncated"] and row["tokens"] == 4 for row in rows)


def test_answers_are_kept_until_the_questions_change(tmp_path):
    evaluation, trainer = build(tmp_path)
    first = evaluation.evaluate(trainer, "before_zero_shot", one_shot=False)
    (kept,) = (tmp_path / "evaluation").iterdir()
    written = kept.stat().st_mtime_ns
    resumed, _ = build(tmp_path)
    assert resumed.evaluate(None, "before_zero_shot", one_shot=False) == first
    assert kept.stat().st_mtime_ns == written  # read, not made again
    changed, _ = build(tmp_path, "--eval_samples", "5")
    rows = changed.evaluate(trainer, "before_zero_shot", one_shot=False)
    assert rows == changed.answers["before_zero_shot"] and len(rows) == 5
    assert kept.stat().st_mtime_ns != written
    read, _ = build(tmp_path, "--eval_samples", "5")
    assert read.evaluate(None, "before_zero_shot", one_shot=False) == rows


@pytest.mark.parametrize("samples", [0, 2], ids=["greedy", "sampled"])
def test_an_evaluation_goes_on_from_the_answers_that_are_kept(tmp_path, monkeypatch, samples):
    """It is stopped in its third batch of 4; what is kept is not generated again."""
    flags = ("--per_device_eval_batch_size", "4")
    total = 12 * (samples or 1)
    made = []
    whole, trainer = build(tmp_path / "whole", *flags)
    wanted = whole.answer(trainer, "before", False, samples)
    assert len(wanted) == total

    def stop_in_the_third_batch(trainer, prompts, greedy):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(prompts))
        return generate(trainer, prompts, greedy)

    stopped, trainer = build(tmp_path / "run", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "generate", stop_in_the_third_batch)
        stopped.answer(trainer, "before", False, samples)
    (file,) = (tmp_path / "run/evaluation").iterdir()
    kept = evaluate.read_answers(file, [(row["question"], row["gold"]) for row in wanted])
    assert made == [4, 4] and kept == wanted[:8]

    def count(trainer, prompts, greedy):
        made.append(len(prompts))
        return generate(trainer, prompts, greedy)

    resumed, trainer = build(tmp_path / "run", *flags)
    monkeypatch.setattr(evaluate, "generate", count)
    assert resumed.answer(trainer, "before", False, samples) == wanted
    assert sum(made) == total


def test_answers_to_fewer_questions_are_kept_when_more_are_asked(tmp_path):
    few, trainer = build(tmp_path, "--eval_samples", "5")
    first = few.evaluate(trainer, "before_zero_shot", one_shot=False)
    (file,) = (tmp_path / "evaluation").iterdir()
    more, trainer = build(tmp_path)
    rows = more.evaluate(trainer, "before_zero_shot", one_shot=False)
    assert rows[:5] == first and len(rows) == 12
    file.write_bytes(file.read_bytes()[:-100])  # cut off: measured again, the same
    again, trainer = build(tmp_path)
    assert again.evaluate(trainer, "before_zero_shot", one_shot=False) == rows


def test_samples_of_a_question_are_one_group():
    """Two questions, four samples each: 1 and 3 of them right."""
    right = [True, False, False, False, True, True, True, False]
    rows = [{"strict_accuracy": r, "lenient_accuracy": True} for r in right]
    found = summarize_samples(rows, 4)
    pairs = [0.5, 1.0]  # with one right of four, half of all pairs hold it
    for k, values in {1: [0.25, 0.75], 2: pairs, 4: [1.0, 1.0]}.items():
        cell = found["strict_accuracy"][k]
        assert cell["value"] == pytest.approx(statistics.fmean(values)) and cell["n"] == 4
        error = statistics.pstdev(values) / 2**0.5
        assert cell["low"] == pytest.approx(max(0.0, cell["value"] - 1.96 * error))
        assert cell["high"] == pytest.approx(min(1.0, cell["value"] + 1.96 * error))
        assert found["lenient_accuracy"][k]["value"] == 1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
        share_right = sum(map(any, choices)) / len(choices)
        assert pass_at_k.pass_at_k(k, n, right) == pytest.approx(share_right)


def test_sampled_answers_are_counted_by_question(tmp_path):
    flags = ("--eval_samples", "6", "--eval_generations", "4")
    evaluation, trainer = build(tmp_path, *flags)
    evaluation.evaluate(trainer, "one_shot", one_shot=True)
    found = evaluation.report()["pass"]["one_shot"]
    for kind in ("strict_accuracy", "lenient_accuracy"):
        values = [found[kind][k]["value"] for k in (1, 2, 4)]
        assert values == sorted(values) and 0 < values[0] < 1
        assert values[0] * 24 == pytest.approx(round(values[0] * 24))  # of 6 x 4 answers
        assert values[2] * 6 == pytest.approx(round(values[2] * 6))  # of 6 questions
    resumed, _ = build(tmp_path, *flags)
    resumed.evaluate(None, "one_shot", one_shot=True)  # read, not made again
    assert resumed.passed == evaluation.passed


def test_the_sentence_on_pass_at_k():
    untrained = {1: 0.5, 2: 0.6, 4: 0.7}
    trained = {1: 0.55, 2: 0.58, 4: 0.6}
    weak = {1: 0.1, 4: 0.2}
    for base, words in ((untrained, "2 samples"), (trained, "one too"), (weak, "4 not")):
        passed = {
            name: {"lenient_accuracy": {k: {"value": v} for k, v in shares.items()}}
            for name, shares in (("before", base), ("after", trained))
        }
        said = pass_at_k.explain(passed)
        assert words in said and "55.0%" in said and "60.0%" in said and f"{base[4]:.1%}" in said


def report(out, **measured: list[dict]) -> dict:
    """Return what an evaluation with these measurements keeps in evaluation.json."""
    args, model_args = grpo_demo.parse_args([*LAPTOP, "--output_dir", str(out)])
    rows = grpo_demo.get_gsm8k_questions("test", "assets/tiny")
    evaluation = Evaluation(args, model_args.model_name_or_path, rows, grpo_demo.make_prompt)
    evaluation.answers = measured
    result = evaluation.report()
    assert json.loads((out / "evaluation.json").read_text()) == result
    return result


@pytest.mark.parametrize("trained", ["zero_shot", "one_shot"])
def test_report_and_its_sentences(tmp_path, trained):
    zero, one, after = planted(0.1, 0.7, 1), planted(0.7, 0.6, 2), planted(0.98, 0.65, 3)
    rows = {"before_zero_shot": zero, "before_one_shot": one, f"after_{trained}": after}
    result = report(tmp_path, **rows)
    before, control = (zero, one) if trained == "zero_shot" else (one, zero)
    expected = decide(before=before, control=control, after=after)
    assert {key: result[key] for key in expected} == expected
    gains = expected["gain"]
    after_name = f"after_{trained}"

    def went(column: str) -> list[float]:
        names = (f"before_{trained}", after_name)
        shares = [result["measurements"][name][column]["value"] for name in names]
        return [*shares, *numbers(gains[column])]

    measured_after = result["measurements"][after_name]["lenient_accuracy"]["value"]
    shot = result["measurements"]["before_one_shot"]["strict_accuracy"]["value"]
    wanted = [
        [*went("strict_accuracy"), shot],
        [share(zero, "lenient_accuracy"), measured_after, *numbers(gains["reasoning"])],
        [gains["format"], *went("soft_format"), *went("strict_format")],
    ]
    sentences = explain(result, result["measurements"])
    assert sentences == result["sentences"]
    for sentence, values in zip(sentences, wanted, strict=True):
        found = [float(number) for number in re.findall(r"[-+]?\d+\.\d", sentence)]
        assert found == pytest.approx([100 * value for value in values], abs=0.051)


def test_without_training_there_is_no_verdict(tmp_path):
    result = report(tmp_path, zero_shot=planted(0.1, 0.6, 1), one_shot=planted(0.7, 0.6, 2))
    assert list(result) == ["settings", "measurements"]
    figures = {name: list(measured) for name, measured in result["measurements"].items()}
    assert figures == {"zero_shot": MEASURES, "one_shot": MEASURES}


# --- records that must agree


RECORDS = ["qwen-1.5b", "qwen-half-b", "qwen-vllm", "qwen-wrong-stops", *tables.LAPTOP.values()]


def load(name: str, file: str):
    return json.loads((ROOT / "assets/research/runs" / name / f"{file}.json").read_text())


@pytest.mark.parametrize("name", RECORDS)
def test_recorded_gains_are_those_of_the_recorded_measurements(name):
    record = load(name, "evaluation")
    before, control, after = (record["measurements"][when] for when in tables.MEASURED)
    best = max(m["lenient_accuracy"]["value"] for m in (before, control))
    for column in ("strict_accuracy", "strict_format"):
        difference = after[column]["value"] - before[column]["value"]
        assert record["gain"][column]["value"] == pytest.approx(difference)
    difference = after["lenient_accuracy"]["value"] - best
    assert record["gain"]["reasoning"]["value"] == pytest.approx(difference)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("file", ["samples", "group"])
def test_recorded_rewards_are_those_of_the_recorded_completions(name, file):
    for row in load(name, file):
        completions = [[{"role": "assistant", "content": row["completion"]}]]
        for function in REWARD_FUNCS:
            (value,) = function(completions=completions, answer=[row["gold"]])
            assert row[function.__name__] == pytest.approx(value, abs=1e-4)


def test_the_laptop_run_is_recorded_twice():
    """The runs at the top of README and the first row of its table of parts."""
    rows = {row["seed"]: row["measured"] for row in tables.lines("parts")["nothing changed"]}
    for seed, measured in rows.items():
        measurements = load(f"laptop-{seed}", "evaluation")["measurements"]
        for name, columns in measured.items():
            for column, value in columns.items():
                assert measurements[name][column]["value"] == pytest.approx(value)


@pytest.mark.parametrize("name", RECORDS)
def test_endings_count_every_completion(name):
    ends = load(name, "endings")
    evaluation, (_, metrics, _) = load(name, "evaluation"), *tables.runs({"": name})
    assert len([key for key in ends if key.startswith("step")]) == len(metrics)
    for when, columns in evaluation["measurements"].items():
        assert sum(ends[when].values()) == columns["tokens"]["n"]
        untagged = 1 - ends[when].get("none", 0) / columns["tokens"]["n"]
        assert columns["soft_format"]["value"] <= untagged  # soft format needs `</answer>`
