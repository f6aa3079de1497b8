"""The five rewards, strict and lenient accuracy, the try of rewards, and hostile texts."""

import asyncio
import contextlib
import io
import json
import math
import re
import time
import timeit
from fractions import Fraction

import pytest
from conftest import ROOT, gsm8k, needs_gsm8k
from gist_rewards import REWARD_FUNCS as GIST
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import REWARD_FUNCS, as_number, final_number

PERFECT = "<reasoning>\nbecause\n</reasoning>\n<answer>\n18\n</answer>\n"


def batch(texts: list[str], golds: list[str]) -> dict[str, list]:
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = [[{"content": ""}]] * len(texts)
    return {"prompts": prompts, "completions": completions, "answer": golds}


def all_five(text: str, answer: str = "18", functions: list = REWARD_FUNCS) -> list[float]:
    return [function(**batch([text], [answer]))[0] for function in functions]


def is_strict_correct(text: str, gold: str) -> bool:
    return rewards.score(text, gold)["strict_accuracy"]


def is_lenient_correct(text: str, gold: str) -> bool:
    return rewards.score(text, gold)["lenient_accuracy"]


def test_names_order_and_alias():
    names = ["xmlcount", "soft_format", "strict_format", "int", "simple_correctness"]
    assert [f.__name__ for f in REWARD_FUNCS] == [f"{n}_reward_func" for n in names]
    assert rewards.correctness_reward_func is rewards.simple_correctness_reward_func
    assert all_five(PERFECT) == [0.5, 0.5, 0.5, 0.5, 2.0]


LONG = PERFECT.replace("because", "x" * 2000)[:-1]  # no final newline: all is charged
BARE = "<reasoning>a</reasoning>"
FIVE = {  # xmlcount, soft, strict, int, extracted answer
    "<reasoning>\n<reasoning>\n": (0, 0, 0, 0, "<reasoning>\n<reasoning>"),  # exactly once
    "x\n<answer>\n": (0.125 - 0.011, 0, 0, 0, ""),  # no closing tag: the whole text is charged
    "x\n<answer>\n5\n</answer>\nabc": (0.25 - 0.006, 0, 0, 0.5, "5"),  # charged twice
    PERFECT[:-1]: (0.5 - 0.001 * len(PERFECT) + 0.002, 0.5, 0, 0.5, "18"),
    LONG: (0.5 - 2.046, 0.5, 0, 0.5, "18"),  # right, but far below zero
    PERFECT.replace("because", "two\nlines\n\nof it"): (0.5, 0.5, 0.5, 0.5, "18"),
    PERFECT + "\n": (0.498, 0.5, 0.5, 0.5, "18"),  # `$` matches before a last newline
    PERFECT + "more": (0.492, 0.5, 0, 0.5, "18"),
    "\n" + PERFECT: (0.5, 0, 0, 0.5, "18"),  # from the very beginning
    f"{BARE} so <answer>b</answer>": (0, 0, 0, 0, "b"),
    f"{BARE} no </reasoning><answer>b</answer>": (0, 0.5, 0, 0, "b"),
    "18": (0, 0, 0, 0.5, "18"),  # no tag: the whole text
    "<answer>1</answer><answer>2</answer>": (0, 0, 0, 0.5, "2"),  # the last one wins
    "<answer>7": (0, 0, 0, 0.5, "7"),  # never closed
    "<answer> -3 </answer> 8": (0, 0, 0, 0, "-3"),
    "<answer>²</answer>": (0, 0, 0, 0.5, "²"),  # str.isdigit knows unicode
    "": (0, 0, 0, 0, ""),
}


def test_the_five_rewards():
    for text, (*values, answer) in FIVE.items():
        assert rewards.extract_xml_answer(text) == answer
        assert all_five(text, answer) == pytest.approx([*values, 2.0], abs=1e-12), text
        assert all_five(text, answer + " ")[4] == 0.0  # exact string
    golds = {"a\n#### 18": "18", "#### $1,234": "1234", "none": None, "#### 1 #### 2": "1"}
    assert {text: rewards.extract_hash_answer(text) for text in golds} == golds


# Parts of hostile texts
TAGS = "<reasoning>|</reasoning>|<answer>|</answer>|⏎| |=|+|1|1,|.|/|$|-|x|\ud800|1+|1,000,|1 234 "
NUMBERS = r"|1 1/|\frac{1|^{1|9{,}|1e|1'|\,| -|$-|½|m2|9 x |1 a + |1 and |(|\boxed{|\boxed{{"
NUMBERS += "|####|#### 1|\u2028|\x1c|²|18|-3"
MARKS = "|#### |answer |answer is |answer⏎|the answer is 1 = |</reasoning> <answer>|⏎</answer>⏎"
UNITS = (TAGS + NUMBERS + MARKS).replace("⏎", "\n").split("|")
PIECES = st.one_of(st.sampled_from(UNITS[:9]), st.sampled_from(UNITS), st.text(max_size=4))
TEXTS = st.lists(PIECES, max_size=24).map("".join)
PARTS = [*PERFECT.replace("\n", " \n ").split(" "), "\n", "18"]
NEAR = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)
CUT = st.integers(0, 60).map(lambda i: PERFECT[:i] + PERFECT[i + 1 :])


@settings(max_examples=1000, deadline=None)
@given(st.one_of(TEXTS, NEAR, CUT), st.sampled_from(["18", "x", ""]))
def test_equal_to_the_gist(text, gold):
    found = all_five(text, gold)
    with contextlib.redirect_stdout(io.StringIO()):  # the gist prints a sample
        assert found == all_five(text, gold, GIST)
    assert all(value in (True, False) for value in rewards.score(text, gold).values())


# --- strict and lenient accuracy

FORMS = json.loads((ROOT / "tests" / "answer_forms.json").read_text(encoding="utf-8"))


def test_lenient_agrees_with_a_careful_person():
    """Each form of an answer was judged by hand: text, gold answer, right or wrong."""
    judged = [(is_lenient_correct(text, gold), right) for text, gold, right in FORMS]
    agree = sum(found == right for found, right in judged)
    accepted = sum(found and not right for found, right in judged)
    print(f"lenient agrees on {agree} of {len(FORMS)} forms, {accepted} false accepts")
    assert len(FORMS) >= 278 and agree >= 336 and accepted <= 4


NO_NUMBER = "5-10 | 5–10 | 5 - 10 | $5-$10 | 5%-10% | 3:4 | 2:30 | 18^2 | 18² | 10^{3} | 1e3 | 3/0"
NO_NUMBER += " | 1.8 × 10^3 | 1,234,4 | 1.000.000 | 1 + 4 | 3 x 4 | √4 | \\sqrt{4} | 4π | 4k"
NO_NUMBER += " | 2024-01-04 | 1/2/4"
WRONG = ["0", "4", "10", "000", "2", "30", "3", "1", "18", "5", "1/2"]  # parts of those


def test_what_is_no_number_is_not_read_in_part():
    frames = ("{}", "The answer is {}", "<answer>{}</answer>", "#### {}")
    forms = [*NO_NUMBER.split(" | "), "9" * 60]
    for text in [frame.replace("{}", form) for form in forms for frame in frames]:
        assert final_number(text) and as_number(final_number(text)) is None, text
        assert not any(is_lenient_correct(text, gold) for gold in WRONG), text


MARKED = {
    "There are $\\boxed{1200}$ pieces in 80 rooms": 1200,
    "\\boxed{9} eggs are left, so she makes \\boxed{18}. Check: 2": 18,
    "eat #### 7 dozen eggs in 4 weeks": 7,
    "#### Step 1\n9 * 2 = 18\n#### 2. The end\nShe makes 18": 18,
    "<answer>\n18 (9 eggs at $2)\n</answer>": 18,
    "<answer>\n9 * 2 = 18 dollars for 9 eggs\n</answer>\nI used 2 steps.": 18,
    "<answer>7</answer> no: <answer>\n$\\boxed{18}$ for 9 eggs\n</answer> 2": 18,
    "<answer>\n</answer>\nThe answer is 18": 18,  # an empty block marks nothing
    "The answer is 18. This took 2 steps.": 18,
    "**Final Answer:**\n\n18 dollars for 9 eggs\n\nQ: Tom has 5.": 18,
    "9 answers. So 18": 18,
    "She makes 18 dollars with 9 eggs": 9,  # no mark: the last number
    "9 * 2 = 18 <answer>none</answer>": None,
    "m^2 and m²": None,
    "": None,
}


def test_a_marked_answer_comes_before_the_last_number():
    assert {text: as_number(final_number(text)) for text in MARKED} == MARKED


def test_gold_numbers():
    assert as_number("45.0") == as_number("45") == as_number(" $45 ") == 45
    assert as_number("-3") == -3 and as_number("1,234.5") == Fraction("1234.5")
    no_gold = ["38,5", "0,5", "18^2", "1e999999999", "eighteen", "", "18 eggs", "3/0", "1 2"]
    assert not any(as_number(text) for text in no_gold)
    assert is_lenient_correct("It is 45", "45.0") and is_strict_correct("<answer>45</answer>", "45")
    no_strict = ["45", "<answer>45", "<answer>45.0</answer>"]
    assert not any(is_strict_correct(text, "45") for text in no_strict)
    assert rewards.simple_correctness_reward_func(**batch(["45"], ["45.0"])) == [0.0]


SEPARATORS = ["", ",", "{,}", r",\!", r"\,", " ", "\u00a0", "\u2009", "\u202f", "~", "'"]
WRITTEN = {f"12{mark}345{mark}678": "12345678" for mark in SEPARATORS}
WRITTEN |= {f"{form}.50": f"{value}.5" for form, value in WRITTEN.items()} | {"0.25": "1/4"}
WRITTEN |= dict.fromkeys(["3/4", "3 / 4", "3⁄4", r"\frac{3}{4}", r"\dfrac34", "0.75"], "3/4")
WRITTEN |= dict.fromkeys(["2 3/4", "2\u00a03/4", r"2\frac{3}{4}", r"2\tfrac34", "2¾"], "11/4")
SIGNS = {"-": ["-", "−", "–", "-$", "$-", r"-\$", "−€"], "": ["", "$", r"\$", "€"]}
AROUND = ["{}", "**{}**", r"\boxed{{{}}}", "${}$", r"\({}\)", "`{}`", "({})", '"{}"']
UNIT = ["", "%", r"\%", "kg", " m^2", " m²", " cm^{3}", r"\text{ m}^2", " m2", "°C", " € each"]
BEFORE = ["", "is ", "3 + 4 = ", "7 - 1 = ", "x^2: ", "Answer:\n", "- ", "(1) ", "1) ", "1, "]
AFTER = ["", ".", "!", ",", "\n", " in all.", "\n</answer>\n", "; that is all"]
SIGNED = [(sign, mark) for sign in SIGNS for mark in SIGNS[sign]]


@settings(max_examples=1000, deadline=None)
@given(*map(st.sampled_from, (SIGNED, list(WRITTEN.items()), BEFORE, AROUND, UNIT, AFTER)))
def test_a_number_is_read_back_from_any_form(sign, written, before, around, unit, after):
    text = before + around.format(sign[1] + written[0]) + unit + after
    value = Fraction(sign[0] + written[1])
    assert as_number(final_number(text)) == value
    assert is_lenient_correct(text, str(value)) and not is_lenient_correct(text, str(value + 1))


@needs_gsm8k
def test_lenient_on_every_gold_solution():
    rows, right = gsm8k("train") + gsm8k("test"), 0
    for row in rows:
        gold = rewards.extract_hash_answer(row["answer"])
        solution = re.sub(r"<<.*?>>", "", row["answer"].split("####")[0]).strip()
        right += is_lenient_correct(solution, gold)
        assert as_number(row["answer"].split("####")[1]) == as_number(gold)  # commas or not
        assert is_lenient_correct(row["answer"], gold)
    # the others end in another number: "... 4 packs of 10 cupcakes", "700 pages in 7 days"
    print(f"lenient {right}/{len(rows)} = {right / len(rows):.4f}")
    assert len(rows) == 8792 and right >= 8554


# --- the command, and the try of one's own rewards


def texts_of(completions: list) -> list[str]:
    return [c[0]["content"] for c in completions]


def too_short(completions, **kwargs):
    return [1.0 for text in texts_of(completions) if "<reasoning>" in text]


async def awaited_text(completions, **kwargs):
    await asyncio.sleep(0)
    return [1.0 if text.endswith("\n") else "a line\nand more" for text in texts_of(completions)]


FAULTY = [
    (lambda completions, **kwargs: 1.0, ValueError),
    (lambda completions, **kwargs: "1" * len(completions), ValueError),
    (lambda completions, **kwargs: dict(enumerate(completions)), ValueError),
    (too_short, ValueError),
    (awaited_text, ValueError),
    (lambda completions, **kwargs: list(map(int, texts_of(completions))), RuntimeError),
]


def test_a_reward_that_fails_or_returns_no_numbers_is_named():
    for reward, kind in FAULTY:
        with pytest.raises(kind) as raised:
            rewards.try_rewards([*REWARD_FUNCS, reward])
        message, cause = str(raised.value), raised.value.__cause__
        assert reward.__name__ in message and "\n" not in message
        assert (cause is None) == (kind is ValueError)  # else the user's own traceback


def test_a_reward_may_log_and_return_odd_numbers(monkeypatch, capsys):
    odd = [None, math.nan, -math.inf, Fraction(1, 2), True, 3, 0.5]
    monkeypatch.setattr(rewards, "REWARD_FUNCS", [rewards.lenient_accuracy, lambda **kwargs: odd])
    rewards.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:17].strip()]
    shown = " ".join(line[-2] for line in lines[1::3])
    assert shown == "0.000 nan -inf 0.500 1.000 3.000 0.500"


def test_accuracy_is_logged():
    texts = [PERFECT, "so 18", PERFECT + "I used 2 steps.", "so 19"]
    metrics, extra = {}, {}
    given = batch(texts, ["18"] * 4)
    given |= {"log_metric": metrics.__setitem__, "log_extra": extra.__setitem__}
    right = rewards.lenient_accuracy(**given, question=list("abcd"), trainer_state=None)
    assert right == [1.0, 1.0, 1.0, 0.0] and all(isinstance(value, float) for value in right)
    assert metrics == {"accuracy/strict": 0.5, "accuracy/lenient": 0.75}
    wanted = {"question": list("abcd"), "text": texts, "gold": ["18"] * 4}
    assert extra == wanted | {"extracted": ["18", "so 18", "18", "so 19"]}


# --- hostile texts

STARTS = ["", "<reasoning>", "<reasoning>\n", "<reasoning>\na\n</reasoning>\n<answer>\n"]


def everything(text: str) -> None:
    """Give a text to all rewards and scores."""
    all_five(text)
    rewards.score(text, "18")
    rewards.extract_hash_answer(text)


def seconds(text: str, rounds: int = 1) -> float:
    """Return the processor time that everything takes with the text, in the fastest round."""
    clock = {"timer": time.process_time, "number": 1, "repeat": rounds}
    return min(timeit.repeat(lambda: everything(text), **clock))


def test_hostile_texts_take_linear_time():
    """Four times the text takes four times the time; with a quadratic rule it would be sixteen."""
    pairs = [(start, unit * (5_000 // len(unit))) for start in STARTS for unit in UNITS]
    for start, units in sorted(pairs, key=lambda pair: seconds("".join(pair)))[-5:]:
        short, long = (seconds(start + units * times, 3) for times in (3, 12))
        print(f"{units[:40]!r}: {long:.4f} s, {long / short:.2f} x a quarter of it")
        assert long / short < 8
