"""The verdict on planted models, intervals, generation, what an evaluation keeps and reports."""

import json
import random
import re
import shutil
import statistics

import pandas as pd
import pytest
import torch
from conftest import LAPTOP, run
from transformers import AutoModelForCausalLM

import grpo_demo
from assets import evaluate
from assets.evaluate import Evaluation, decide_verdict, generate, mean_interval, paired_interval
from assets.tools import pass_at_k
from rewards import score

torch.set_num_threads(1)  # the model is small: more threads wait longer than they compute
XML = "<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n{}\n</answer>\n"
SOFT = XML.replace("\n", " ")
CONTINUOUS = ["--use_transformers_continuous_batching=True"]
CONTINUOUS += ["--transformers_continuous_batching_config", '{"max_memory_percent": 0.05}']
END, ZERO = 2, 18  # ids: <|im_end|>; the digit 0, which is in a third of the answers


def planted(form: float, right: float, seed: int, form_text: str = XML) -> list[dict]:
    """Return 500 answers of a model: a share `form` is in XML, a share `right` is right."""
    rows, rng, skill = [], random.Random(seed), random.Random(99)  # skill is the same for all
    for _ in range(500):
        answer = 18 if skill.random() < right else 17
        text = form_text.format(answer) if rng.random() < form else f"The answer is {answer}."
        rows.append({"completion": text, "truncated": False, "tokens": 9} | score(text, "18"))
    return rows


def numbers(interval: dict) -> list[float]:
    return [interval[key] for key in ("value", "low", "high")]


PLANTED = [  # before, control, after: shares in XML and right; the verdict; due to reasoning
    ((0.05, 0.6), (0.7, 0.6), (0.98, 0.6), "format", 0),
    ((0.9, 0.4), (0.9, 0.4), (0.9, 0.7), "reasoning", 0.3),
    ((0.1, 0.4), (0.5, 0.4), (0.9, 0.7), "format and reasoning", 0.3),
    ((0.5, 0.4), (0.5, 0.4), (0.5, 0.4), "neither", 0),
    ((0.1, 0.3), (0.9, 0.6), (0.9, 0.6), "format", 0),  # the better prompt is the control
    ((0.1, 0.6), (0.9, 0.3), (0.9, 0.6), "format", 0),  # it is that of training
    ((0.1, 0.8), (0.9, 0.8), (0.99, 0.6), "format", -0.2),  # reasoning was lost
    ((0.0, 0.6), (0.0, 0.6), (0.98, 0.6, SOFT), "format", 0),  # in soft format only
]


def test_the_verdict_on_planted_models():
    for before, control, after, verdict, reasoning in PLANTED:
        rows = {"before": before, "control": control, "after": after}
        rows = {name: planted(*model[:2], 1, *model[2:]) for name, model in rows.items()}
        result = decide_verdict(**rows)
        gain, (value, low, high) = result["gain"], numbers(result["gain"]["reasoning"])
        assert result["verdict"] == verdict
        assert low < value < high and low < reasoning < high and (value == 0) == (reasoning == 0)
        assert gain["strict_accuracy"]["value"] == pytest.approx(value + gain["format"])


def test_intervals_and_pass_at_k():
    rng, held = random.Random(0), 0  # 95% of 2,000 paired intervals hold the true difference, 0.1
    for _ in range(2000):
        draws = [rng.random() for _ in range(200)]
        before = [{"x": draw < 0.4} for draw in draws]
        after = [{"x": 0.05 < draw < 0.55} for draw in draws]
        _, low, high = numbers(paired_interval("x", before, after))
        held += low <= 0.1 <= high
    assert 0.93 <= held / 2000 <= 0.97
    assert paired_interval("x", [{"x": False}], [{"x": True}])["high"] == 1
    for k, wanted in {0: (0.0, 0.2775), 5: (0.2366, 0.7634), 10: (0.7225, 1.0)}.items():
        found = mean_interval([i < k for i in range(10)], share=True)  # Wilson's: published
        assert numbers(found) == pytest.approx([k / 10, *wanted], abs=1e-4) and found["n"] == 10
    right = [True, False, False, False, True, True, True, False]  # 1 and 3 of four
    rows = [{"strict_accuracy": r, "lenient_accuracy": True} for r in right]
    found = pass_at_k.summarize_samples(rows, 4)  # two questions
    values = [found["strict_accuracy"][k]["value"] for k in (1, 2, 4)]
    assert values == pytest.approx([0.5, 0.75, 1]) and found["lenient_accuracy"][1]["value"] == 1
    lengths = [3, 5, 5, 8, 21]
    normal = statistics.NormalDist(statistics.fmean(lengths), statistics.pstdev(lengths) / 5**0.5)
    wanted = [normal.mean, normal.inv_cdf(0.025), normal.inv_cdf(0.975)]
    assert numbers(mean_interval(lengths)) == pytest.approx(wanted, rel=1e-4)


def build(tmp_path, *flags: object, file: dict | None = None, n: int = 12) -> tuple:
    """Return evaluation and trainer on n questions; `file` is generation_config.json."""
    name = "assets/tiny"
    if file is not None:
        name = str(shutil.copytree(name, tmp_path / "model", dirs_exist_ok=True))
        (tmp_path / "model/generation_config.json").write_text(json.dumps(file))
    flags = ["--report_to", "none", "--eval_samples", n, "--beta", 0, *flags]
    flags += ["--model_name_or_path", name, "--output_dir", tmp_path / "out"]
    args, model_args = grpo_demo.parse_args([*LAPTOP, *map(str, flags)])
    rows = grpo_demo.load_questions(args, "test")
    evaluation = Evaluation(args, name, rows, grpo_demo.make_prompt)
    return evaluation, grpo_demo.build_trainer(args, model_args, rows)


def sample(trainer, greedy: bool = False) -> list[list[int]]:
    """Return the tokens that the trainer's own generation makes for its questions."""
    trainer.generation_config.do_sample = trainer.generation_kwargs["do_sample"] = not greedy
    ids = trainer._tokenize_prompts(trainer.train_dataset["prompt"][:])[0]
    torch.manual_seed(3)
    return trainer._generate_single_turn(ids, None, {}, 1)[0]


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("eos", [None, END, [END, ZERO]], ids=["no eos", "one eos", "two eos"])
def test_the_evaluation_generates_what_the_trainer_does(tmp_path, eos, greedy):
    _, trainer = build(tmp_path, "--max_completion_length", 20, file={"eos_token_id": eos}, n=64)
    wanted, stops = sample(trainer, greedy), eos if isinstance(eos, list) else [END]
    assert {ids[-1] for ids in wanted} > set(stops)  # each stops some, and some are cut off
    torch.manual_seed(3)
    rows = generate(trainer, trainer.train_dataset["prompt"][:], greedy)
    texts = [ids[:-1] if ids[-1] in stops else ids for ids in wanted]
    assert [row["completion"] for row in rows] == trainer.processing_class.batch_decode(texts)
    assert [row["tokens"] for row in rows] == [len(ids) for ids in wanted]
    assert [row["truncated"] for row in rows] == [ids[-1] not in stops for ids in wanted]


def test_each_backend_generates_the_same(tmp_path):
    (_, plain), (_, continuous) = build(tmp_path, n=32), build(tmp_path, *CONTINUOUS, n=32)
    prompts, wanted = plain.train_dataset["prompt"][:], sample(plain, greedy=True)
    assert len(set(map(tuple, wanted))) > 20 and sample(continuous, greedy=True) == wanted
    whole = generate(plain, prompts)
    assert generate(continuous, prompts) == whole
    assert [row for prompt in prompts[:4] for row in generate(plain, [prompt])] == whole[:4]


def test_how_a_completion_ends(tmp_path):
    """What follows the stop token is padding; special tokens are left out of the text."""
    _, trainer = build(tmp_path)
    text = trainer.processing_class("3 + 4 = 7")["input_ids"]
    for tokens, length, truncated in [
        ([*text, END, END, 1], len(text) + 1, False),
        ([1, *text, 1], len(text) + 2, True),
    ]:
        found = evaluate.read_tokens(trainer, tokens)
        assert [*found.values()] == ["3 + 4 = 7", length, truncated]


def test_evaluate_asks_all_scores_all_and_leaves_random_numbers_alone(tmp_path):
    evaluation, trainer = build(tmp_path / "a", "--per_device_eval_batch_size", 8)
    state = torch.get_rng_state()
    first = evaluation.evaluate(trainer, "before_zero_shot", one_shot=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row["question"] for row in first] == evaluation.rows["question"][:]
    for row, gold in zip(first, evaluation.rows["answer"], strict=True):
        assert row["gold"] == gold and row.items() >= score(row["completion"], gold).items()
        ids = trainer.processing_class(row["completion"])["input_ids"]
        assert row["truncated"] is False and row["tokens"] == len(ids) + 1  # and the end of turn
    one_shot = evaluation.evaluate(trainer, "before_one_shot", one_shot=True)
    assert sum(r["strict_format"] for r in one_shot) > sum(r["strict_format"] for r in first)


@pytest.mark.parametrize("samples", [0, 2], ids=["greedy", "sampled"])
def test_answers_are_kept_and_only_missing_ones_are_generated(tmp_path, samples):
    """Stopped in its third batch of 4; resumed; read; scores spoiled; cut off; other questions."""
    asked, stop, n = [], None, samples or 1  # n answers to a question

    def make_prompt(question: str, one_shot: bool) -> list[dict]:
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(question)
        return grpo_demo.make_prompt(question, one_shot)

    def answer(questions: int = 12) -> list[dict]:
        asked.clear()
        evaluation, trainer = build(tmp_path, "--per_device_eval_batch_size", 4, n=questions)
        evaluation.make_prompt = make_prompt
        return evaluation.answer(trainer, "x", False, samples)

    file = tmp_path / "out/evaluation/x.parquet"
    wanted = answer()
    file.unlink()
    stop = 8
    with pytest.raises(KeyboardInterrupt):
        answer()
    stop, kept = None, pd.read_parquet(file).to_dict("records")
    assert kept == wanted[:8] and answer() == wanted and len(asked) == 12 * n - 8
    assert answer() == wanted and not asked
    pd.DataFrame(wanted).assign(lenient_accuracy=True, soft_format=True).to_parquet(file)
    assert answer() == wanted and not asked  # scored by rewards.py as it is now
    file.write_bytes(file.read_bytes()[:-100])
    assert answer() == wanted and len(asked) == 12 * n
    assert answer(5) == wanted[: 5 * n] and len(asked) == 5 * n
    assert answer()[: 5 * n] == wanted[: 5 * n] and len(asked) == 7 * n


@pytest.mark.parametrize("trained", ["zero_shot", "one_shot"])
def test_report_and_what_it_shows(tmp_path, trained):
    zero, one, after = planted(0.1, 0.7, 1), planted(0.7, 0.6, 2), planted(0.98, 0.65, 3)
    args, _ = grpo_demo.parse_args([*LAPTOP, "--output_dir", str(tmp_path)])
    evaluation = Evaluation(args, "assets/tiny", None, None)
    evaluation.answers = {"before_zero_shot": zero, "before_one_shot": one}
    evaluation.answers[f"after_{trained}"] = after
    result = evaluation.report()
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    measured = result["measurements"]
    for name, rows in evaluation.answers.items():
        shares = [mean_interval([row[x] for row in rows], True) for x in evaluate.MEASURES[:-1]]
        assert [*measured[name].values()][:-1] == shares
    before, control = (zero, one) if trained == "zero_shot" else (one, zero)
    assert decide_verdict(before=before, control=control, after=after).items() <= result.items()

    gain = result["gain"]
    wanted = [numbers(gain[name]) for name in (*evaluate.GAINS, "reasoning")]
    for line, values in zip(evaluate.show(result).splitlines()[-4:], wanted, strict=True):
        found = [float(number) for number in re.findall(r"[-+]?\d+\.\d", line)]
        assert found == pytest.approx([100 * value for value in values], abs=0.051)


ALONE = """--report_to none --save_strategy no --beta 0 --max_steps 2 --num_generations 4
    --per_device_train_batch_size 16 --max_completion_length 32 --eval_samples 36"""
WAYS = {
    "plain": "--use_peft --evaluate False",
    "evaluated": "--use_peft --per_device_eval_batch_size 64",
    "bf16": "--bf16 True --learning_rate 0",
}


def test_an_evaluation_leaves_training_alone_and_has_its_precision(tmp_path, monkeypatch):
    """At learning rate 0, after is before, in bf16 over float32 too."""
    for name, more in WAYS.items():
        done = run(*LAPTOP, *ALONE.split(), *more.split(), "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr[-2000:]
    for step in ("00001", "00002"):
        file = f"completions/completions_{step}.parquet"
        plain, other = (pd.read_parquet(tmp_path / name / file) for name in [*WAYS][:2])
        assert len(plain) == 16 and plain.equals(other)
    assert not (tmp_path / "plain/evaluation.json").exists()
    files = [f"bf16/evaluation/{when}_zero_shot.parquet" for when in ("before", "after")]
    before, after, float32 = (
        pd.read_parquet(tmp_path / file)["completion"]
        for file in (*files, files[0].replace("bf16", "evaluated"))
    )
    assert before.equals(after) and not before.equals(float32)  # the precision shows
    monkeypatch.chdir(tmp_path)  # the adapter finds its base from anywhere
    assert AutoModelForCausalLM.from_pretrained("evaluated").num_parameters()
