"""The rules of the five rewards and of strict and lenient accuracy, and hostile texts.

The rewards agree with the gist's functions and with an implementation that uses no regexes.
"""

import asyncio
import contextlib
import functools
import io
import math
import random
import re
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from conftest import ROOT, gsm8k, needs_gsm8k, note
from gist_rewards import REWARD_FUNCS as GIST
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewards
from rewards import (
    REWARD_FUNCS,
    as_number,
    count_xml,
    extract_hash_answer,
    extract_xml_answer,
    is_lenient_correct,
    is_strict_correct,
    last_number,
    lenient_accuracy,
    plain,
    score,
    try_rewards,
)

PERFECT = "<reasoning>\nbecause\n</reasoning>\n<answer>\n18\n</answer>\n"


def batch(texts: list[str], golds: list[str]) -> dict[str, list]:
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return {
        "prompts": [[{"content": ""}]] * len(texts),
        "completions": completions,
        "answer": golds,
    }


def reward(name: str, text: str, answer: str = "18") -> float:
    return getattr(rewards, f"{name}_reward_func")(**batch([text], [answer]))[0]


def all_five(text: str, answer: str = "18", functions: list = REWARD_FUNCS) -> list[float]:
    return [function(**batch([text], [answer]))[0] for function in functions]


def test_names_order_and_alias():
    names = ["xmlcount", "soft_format", "strict_format", "int", "simple_correctness"]
    assert [f.__name__ for f in REWARD_FUNCS] == [f"{n}_reward_func" for n in names]
    assert rewards.correctness_reward_func is rewards.simple_correctness_reward_func


def test_perfect_earns_four():
    assert all_five(PERFECT) == [0.5, 0.5, 0.5, 0.5, 2.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        ("<reasoning>\n", 0.125),
        ("<reasoning>\n<reasoning>\n", 0.0),  # exactly once
        ("x\n</reasoning>\n", 0.125),
        ("x\n<answer>\n", 0.125 - 0.001 * 11),  # no closing tag: the whole text is charged
        ("x\n<answer>\n5\n</answer>\n", 0.25),
        ("x\n<answer>\n5\n</answer>\nabc", 0.25 - 0.003 - 0.003),  # charged twice
        # no final newline: all 22 characters are charged, and one is given back
        ("x\n<answer>\n5\n</answer>", 0.125 - 0.001 * 22 + 0.125 + 0.001),
        (PERFECT[:-1], 0.5 - 0.001 * len(PERFECT[:-1]) + 0.001),
        (PERFECT + PERFECT, 0.0),  # everything twice
        # a correct answer far below zero
        (PERFECT.replace("because", "x" * 2000)[:-1], 0.5 - 2.047 + 0.001),
    ],
)
def test_xmlcount(text, value):
    assert count_xml(text) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "soft", "strict"),
    [
        (PERFECT, True, True),
        (PERFECT.replace("because", "two\nlines\n\nof it"), True, True),  # the dot matches newlines
        (PERFECT[:-1], True, False),
        (PERFECT + "\n", True, True),  # `$` matches before a last newline
        (PERFECT + "\n\n", True, False),
        (PERFECT + "more", True, False),
        ("\n" + PERFECT, False, False),  # from the very beginning
        ("<reasoning>a</reasoning><answer>b</answer>", True, False),
        ("<reasoning>a</reasoning> \n\t <answer>b</answer> and more", True, False),
        ("<reasoning>a</reasoning> so <answer>b</answer>", False, False),
        ("<reasoning></reasoning><answer></answer>", True, False),
        ("<reasoning>\n\n</reasoning>\n<answer>\n\n</answer>\n", True, True),
        ("<reasoning>\n</reasoning>\n<answer>\n</answer>\n", True, False),
        ("<reasoning>a</reasoning> no </reasoning><answer>b</answer>", True, False),
        ("<answer>b</answer><reasoning>a</reasoning>", False, False),
    ],
)
def test_formats(text, soft, strict):
    assert (reward("soft_format", text), reward("strict_format", text)) == (
        0.5 * soft,
        0.5 * strict,
    )


@pytest.mark.parametrize(
    ("text", "answer", "is_int"),
    [
        (PERFECT, "18", True),
        ("18", "18", True),  # no tag: the whole text
        ("<answer>1</answer><answer>2</answer>", "2", True),  # the last one wins
        ("<answer>7", "7", True),  # never closed
        ("<answer> 7 </answer> 8", "7", True),
        ("<answer>-3</answer>", "-3", False),
        ("<answer>1,000</answer>", "1,000", False),
        ("<answer>²</answer>", "²", True),  # str.isdigit knows unicode
        ("<answer>٣</answer>", "٣", True),
        ("<answer>½</answer>", "½", False),
        ("", "", False),
    ],
)
def test_extract_and_int(text, answer, is_int):
    assert extract_xml_answer(text) == answer
    assert reward("int", text) == 0.5 * is_int
    assert reward("simple_correctness", text, answer) == 2.0
    assert reward("simple_correctness", text, answer + " ") == 0.0  # exact string


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("a\n#### 18", "18"),
        ("#### $1,234", "1234"),
        ("#### -5 ", "-5"),
        ("none", None),
        ("#### 1 #### 2", "1"),
    ],
)
def test_gold(text, gold):
    assert extract_hash_answer(text) == gold


def no_regex(text: str, gold: str) -> list[float]:
    """Return the five rewards from positions and slices only."""

    def after(tag: str) -> int:
        end = 0  # of the last occurrence, counted from the left without overlaps
        while (at := text.find(tag, end)) >= 0:
            end = at + len(tag)
        return len(text) - end

    xml = 0.125 * sum(len(text.split(tag)) == 2 for tag in ("<reasoning>\n", "\n</reasoning>\n"))
    if len(text.split("\n<answer>\n")) == 2:
        xml += 0.125 - 0.001 * after("\n</answer>\n")
    if len(text.split("\n</answer>")) == 2:
        xml += 0.125 - 0.001 * (after("\n</answer>") - 1)

    def soft() -> bool:
        if not text.startswith("<reasoning>"):
            return False
        starts = [i for i in range(11, len(text)) if text.startswith("</reasoning>", i)]
        rests = [text[i + 12 :].lstrip() for i in starts]
        # str.strip and \s agree on all characters but the four ASCII separators, which both know
        return any(r.startswith("<answer>") and "</answer>" in r[8:] for r in rests)

    def strict() -> bool:
        ends = [e for e in ("\n</answer>\n", "\n</answer>\n\n") if text.endswith(e)]
        middle = "\n</reasoning>\n<answer>\n"
        at = text.find(middle, 12)
        fits = any(len(text) - len(e) >= at + len(middle) for e in ends)
        return text.startswith("<reasoning>\n") and at >= 0 and fits

    tail = text[text.rfind("<answer>") + 8 :] if "<answer>" in text else text
    answer = tail[: tail.find("</answer>")].strip() if "</answer>" in tail else tail.strip()
    digits = len(answer) > 0 and all(c.isdigit() for c in answer)
    return [xml, 0.5 * soft(), 0.5 * strict(), 0.5 * digits, 2.0 * (answer == gold)]


PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "18", "-3", "x"]
PIECES += ["²", "\ud800", "\u2028", "\x1c"]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=24).map("".join)
PARTS = [*PERFECT.replace("\n", " \n ").split(" "), "\n", "18"]
NEAR = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)
CUT = st.integers(0, 60).map(lambda i: PERFECT[:i] + PERFECT[i + 1 :])


@settings(max_examples=3000, deadline=None)
@given(st.one_of(TEXTS, NEAR, CUT), st.sampled_from(["18", "x", ""]))
def test_agrees_with_the_gist_and_with_a_second_implementation(text, gold):
    found = all_five(text, gold)
    with contextlib.redirect_stdout(io.StringIO()):  # the gist prints a sample
        assert found == all_five(text, gold, GIST)
    assert found == pytest.approx(no_regex(text, gold), abs=1e-9)


@needs_gsm8k
def test_all_gold_answers_parse():
    golds = [extract_hash_answer(row["answer"]) for row in gsm8k("train")]
    assert len(golds) == 7473 and all(as_number(g) is not None for g in golds)
    assert sum(g.startswith("-") for g in golds) == 3


# --- strict and lenient accuracy


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("so 1,000", "1000", True),
        ("$18", "18", True),
        ("-$18", "-18", True),
        ("$-18", "-18", True),
        ("18.00 dollars", "18", True),
        ("it is -3.", "-3", True),
        ("it is −3", "-3", True),
        ("10-3", "3", True),  # no sign between numbers
        ("half, 3/4", "0.75", True),
        ("He needs 18.", "18", True),
        ("18kg", "18", True),
        ("5 then 7", "5", False),  # the last one
        (PERFECT, "18", True),
        ("<answer>\n1,080\n</answer>\n", "1080", True),
        ("0.5", "5", False),
        (".5", "0.5", True),
        ("3/0", "3", False),
        ("none", "18", False),
        ("", "18", False),
        ("18", "eighteen", False),
        ("9" * 10_000, "9", False),
        ("18", "1e999999999", False),
    ],
)
def test_lenient(text, gold, right):
    assert is_lenient_correct(text, gold) is right


def test_strict_needs_the_tags():
    assert is_strict_correct(PERFECT, "18") and is_strict_correct("<answer>18</answer>", "18")
    assert not is_strict_correct("18", "18") and not is_strict_correct("<answer>18", "18")
    assert not is_strict_correct("<answer>18.00</answer>", "18")


READINGS = [  # the number a person reads last in each of these texts
    ("9500", r"9{,}500 | 9,\!500 | 9\,500 | 9{\,}500 | 9\;500 | 9~500 | 9 500 | 9'500 | 9’500"),
    ("9500", "9\u00a0500 | 9\u2009500 | 9\u202f500 | 9\u2007500 | about ~9,500, | 9 500.00 €"),
    ("9500", r"$9{,}500$ | \$9{,}500 | \boxed{\$9,\!500.00} | \frac{9{,}500}{1} | **€9 500**"),
    ("1234567", r"1,234,567 | 1 234 567 | 1{,}234{,}567 | €1 234 567 | 1\,234\,567 kg"),
    ("-18", r"-\$18 | \$-18 | -€18 | –18 | −18 | ‑18 | −$18 | –\$18 | -\$\,18 | $$-18$$ | $-18$"),
    ("-18", "x=-18 | \\(-18\\) | \\boxed{-18} | **-18** | 5 + -18 | (3, -18) | 10\n-18 | 1) -18"),
    ("18", r"18 m^2 | 18 m² | 18m² | 18 m2 | 18 cm3. | 18 cm^{2} | 18\,\text{cm}^{-1} | 18 s^-1"),
    ("18", r"18 m<sup>2</sup> | 18 m^(2) | 18^\circ | 18°C | 18kg | 18-year-old | 18th | 18 eggs"),
    (
        "18",
        r"**18** | _18_ | `18` | \boxed{18} | \textbf{18} | (18) | 18. | 18, | 18\\ | 18! | #18",
    ),
    (
        "18",
        r"18% | 18\% | $18.00 | $ 18 | 18 $ | 18$ | \$\,18 | Rs.18 | US$18 | ...18 | - 18 | – 18",
    ),
    ("10", "5-10 | 5–10 | 5 - 10 | 5 – 10 | 5 –10 | 5--10 | $5-$10 | 5%–10% | 5€-10€ | 5°–10°"),
    (
        "3/2",
        "1 1/2 | 1½ | 1 ½ | 1\\frac{1}{2} | 1 \\frac12 | 1\\tfrac{1}{2} | 1\u00a01/2 | 3/2 | 1.5",
    ),
    (
        "-3/2",
        r"-1 1/2 | −1½ | -1\frac{1}{2} | \frac{-3}{2} | -\dfrac{3}{2} | -\$1.50 | -3/2 | −3⁄2",
    ),
    ("3/4", r"\frac{3}{4} | \frac34 | \nicefrac{3}{4} | ¾ | 3⁄4 | .75 | 1.5/2 | \frac{1.5}{2}"),
    ("500", "0 500 | 2 500-page books | 2024 500 | 0.5 500 | 1/2 500 | 9, 500 | 9\n500 | 9  500"),
    ("4", "2 3 4 | 12 345 4 | 10 20/5 | 1,234,4 | 5 x 4 | 3:4 | x^2 + 4 | 4 + x^2"),
]
POWERS = ["18^2", "18²", "10^{3}", "1e3", "1.8 × 10^3", "3/0", "9" * 60]  # not read as a number


@pytest.mark.parametrize(("number", "forms"), READINGS)
def test_numbers_as_they_are_typeset(number, forms):
    for form in forms.split(" | "):
        for text in (form, f"The answer is {form}", f"First 7. So: {form}\nThat is all!"):
            assert as_number(last_number(text)) == Fraction(number), text


@pytest.mark.parametrize("text", POWERS)
def test_powers_equal_nothing(text):
    assert last_number(text) and as_number(last_number(text)) is None
    assert last_number("m^2") == last_number("m²") == ""


SEPARATORS = ["", ",", "{,}", r",\!", r"\,", " ", "\u00a0", "\u2009", "\u202f", "~", "'"]
MINUS = ["-", "−", "–", "-$", "$-", r"-\$", "−€"]
AROUND = ["{}", "**{}**", r"\boxed{{{}}}", "${}$", r"\({}\)", "`{}`", "({})", '"{}"']
UNIT = ["", "%", r"\%", "kg", " m^2", " m²", " cm^{3}", r"\text{ m}^2", " m2", "°C", " € each"]
BEFORE = ["", "is ", "3 + 4 = ", "7 - 1 = ", "x^2: ", "Answer:\n", "- ", "(1) ", "1) ", "1, "]
AFTER = ["", ".", "!", ",", "\n", " in all.", "\n</answer>\n", "; that is all"]


def groups(number: int, separator: str) -> str:
    return f"{number:,}".replace(",", separator)


@st.composite
def written(draw) -> tuple[Fraction, str]:
    """Return a number and one of its written forms."""

    def pick(*choices):
        return draw(st.sampled_from(choices))

    whole, separator = draw(st.integers(0, 10 ** draw(st.integers(1, 12)))), pick(*SEPARATORS)
    value, form = Fraction(whole), groups(whole, separator)
    match pick("whole", "decimal", "fraction", "mixed"):
        case "decimal":
            digits = draw(st.from_regex(r"[0-9]{1,4}", fullmatch=True))
            value, form = Fraction(f"{whole}.{digits}"), f"{form}.{digits}"
        case "fraction":
            bottom = draw(st.integers(1, 99))
            value /= bottom
            tex = [rf"\frac{{{whole}}}{{{bottom}}}", rf"\dfrac{{{whole}}}{{{bottom}}}"]
            form = pick(f"{whole}/{bottom}", f"{whole}⁄{bottom}", *tex)
        case "mixed":
            top, bottom = pick((1, 2), (3, 4), (2, 3), (5, 16))
            value += Fraction(top, bottom)
            tex = [rf"\frac{{{top}}}{{{bottom}}}", rf"\tfrac{{{top}}}{{{bottom}}}"]
            short = {(1, 2): ["½"], (3, 4): ["¾"]}.get((top, bottom), [])
            form += pick(f" {top}/{bottom}", f"\u00a0{top}/{bottom}", *tex, *short)
    if draw(st.booleans()):
        return -value, pick(*MINUS) + form
    return value, pick("", "$", r"\$", "€") + form


@settings(max_examples=5000, deadline=None)
@given(written(), *map(st.sampled_from, (BEFORE, AROUND, UNIT, AFTER)))
def test_a_number_is_read_back_from_any_form(number, before, around, unit, after):
    value, form = number
    text = before + around.format(form) + unit + after
    assert as_number(last_number(text)) == value
    assert is_lenient_correct(text, str(value)) and not is_lenient_correct(text, str(value + 1))


@settings(max_examples=3000, deadline=None)
@given(st.text(), st.text(), st.text())
def test_lenient_wherever_strict(before, gold, after):
    gold, after = gold.replace("<", "").strip(), after.replace("<", "")
    for text in (f"{before}<answer>{gold}</answer>{after}", PERFECT.replace("18", gold) + after):
        assert is_strict_correct(text, gold) and is_lenient_correct(text, gold)


def test_a_number_after_the_answer():
    text = PERFECT + "I used 2 steps."
    assert is_lenient_correct(text, "18") and is_lenient_correct(text, "2")
    assert not is_lenient_correct(text, "3")


MARKS = ["1,000", "3/4", "²", "½", r"\frac{3}{4}", "^{2", " 500", "{,}", r"\,", "e5", "m2", "$-"]


@settings(max_examples=5000, deadline=None)
@given(st.lists(st.sampled_from([*"0123456789.,'/$-−^%+ a)\n", *MARKS])).map("".join))
def test_last_number_is_the_last_match(text):
    found = [match.group() for match in rewards.NUMBER.finditer(plain(text))]
    assert last_number(text) == ["", *found][-1]
    if found:  # what was found is read as it stands, without what was around it
        assert plain(found[-1]) == found[-1] and rewards.NUMBER.fullmatch(found[-1])


@needs_gsm8k
def test_lenient_on_every_gold_solution():
    rows, right = gsm8k("train") + gsm8k("test"), 0
    for row in rows:
        solution = re.sub(r"<<.*?>>", "", row["answer"].split("####")[0]).strip()
        right += is_lenient_correct(solution, extract_hash_answer(row["answer"]))
    # the others end in another number: "... 4 packs of 10 cupcakes", "700 pages in 7 days"
    print(f"lenient {right}/{len(rows)} = {right / len(rows):.4f}")
    assert len(rows) == 8792 and right / len(rows) > 0.97


def test_the_command_prints_what_each_example_earns():
    command = [sys.executable, "rewards.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, *blocks = done.stdout.strip().split("\n\n")
    for block, (name, text, comment) in zip(blocks, rewards.EXAMPLES, strict=True):
        values, (cells, why, shown) = all_five(text), block.splitlines()
        assert cells.startswith(f"{name:>17}") and comment in why and shown.strip() == repr(text)
        assert cells[17:].split() == [f"{value:.3f}" for value in [*values, sum(values)]]
        assert max(map(len, (cells, why, shown))) <= 80


def test_the_columns_of_the_table(capsys):
    rewards.main()
    five = capsys.readouterr().out
    names = ["xmlcount", "soft", "strict", "int", "correct", "sum"]
    assert five.splitlines()[0].split() == ["gold", "answer:", "18", *names]


def test_a_reward_of_ones_own_is_a_column(monkeypatch, capsys):
    def brevity_reward_func(completions, **kwargs):
        return [None if "<" in c[0]["content"] else 1 for c in completions]

    def number_of_words_in_all(prompts, question, log_extra, log_metric, completions, **kwargs):
        log_extra("words", [len(c[0]["content"].split()) for c in completions])
        log_metric("words", 1.0)
        return [len(completions)] * len(prompts)

    monkeypatch.setattr(rewards, "REWARD_FUNCS", [*REWARD_FUNCS, brevity_reward_func])
    rewards.main()
    head, *blocks = capsys.readouterr().out.split("\n\n")
    names = ["xmlcount", "soft", "strict", "int", "correct", "brevity", "sum"]
    assert head.split()[3:] == names
    for block, (_, text, _) in zip(blocks, rewards.EXAMPLES, strict=True):
        values = [*all_five(text), 0.0 if "<" in text else 1.0]  # None counts as 0 in the sum
        cells = block.splitlines()[0]
        assert cells[17:].split() == [f"{value:.3f}" for value in [*values, sum(values)]]
        assert len(cells) == len(head) == 80

    monkeypatch.setattr(rewards, "REWARD_FUNCS", [number_of_words_in_all])
    rewards.main()
    head, *blocks = capsys.readouterr().out.split("\n\n")
    assert head.split()[3:] == ["number_of_words_in_all", "sum"]
    assert all(b.splitlines()[0].split()[-2:] == ["7.000", "7.000"] for b in blocks)
    assert len({len(b.splitlines()[0]) for b in [head, *blocks]}) == 1


def test_the_table_of_a_reward_that_fails(monkeypatch, capsys):
    def broken(completions, **kwargs):
        raise KeyError("two\nlines")

    monkeypatch.setattr(rewards, "REWARD_FUNCS", [*REWARD_FUNCS, broken])
    with pytest.raises(SystemExit) as stopped:
        rewards.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 and "broken" in printed.err and "KeyError" in printed.err


# --- a reward of one's own is tried


def texts_of(completions: list) -> list[str]:
    return [c[0]["content"] for c in completions]


def raises(completions, **kwargs):
    return [1 / text.count("<answer>") for text in texts_of(completions)]


def raises_lines(completions, **kwargs):
    raise RuntimeError("first\nsecond")


def lacks_a_column(completions, solution, **kwargs):
    return [1.0 for _ in completions]


def takes_no_more(completions, answer):
    return [1.0 for _ in completions]


def returns_a_number(completions, **kwargs):
    return 1.0


def returns_none(completions, **kwargs):
    return None


def returns_text(completions, **kwargs):
    return "1" * len(completions)


def returns_a_dict(completions, **kwargs):
    return dict.fromkeys(range(len(completions)), 1.0)


def too_short(completions, **kwargs):
    return [1.0 for text in texts_of(completions) if "<reasoning>" in text]


def averages(completions, **kwargs):
    return [1.0]


def gives_text(completions, **kwargs):
    return [1.0 if text.endswith("\n") else "a line\nand more" for text in texts_of(completions)]


def gives_lists(completions, **kwargs):
    return [[1.0] for _ in completions]


async def awaited_raises(completions, **kwargs):
    await asyncio.sleep(0)
    raise OSError("no network")


WRONG = {  # reward: the example that is named, and what else is
    raises: ("plain prose", "ZeroDivisionError: division by zero"),
    raises_lines: ("perfect", "RuntimeError: first second"),
    lacks_a_column: ("perfect", "'solution'"),
    takes_no_more: ("perfect", "TypeError"),
    returns_a_number: ("perfect", "1.0"),
    returns_none: ("perfect", "None"),
    returns_text: ("perfect", "'1'"),
    returns_a_dict: ("perfect", "{0: 1.0}"),
    too_short: ("plain prose", "[]"),
    averages: ("all", "[1.0], not a list of 7"),  # right alone
    gives_text: ("no final newline", "a line"),
    gives_lists: ("perfect", "[1.0]"),
    awaited_raises: ("perfect", "OSError: no network"),
}


@pytest.mark.parametrize("reward", WRONG)
def test_a_reward_that_fails_is_named(reward):
    example, what = WRONG[reward]
    with pytest.raises(ValueError) as raised:
        try_rewards([*REWARD_FUNCS, reward])
    message = str(raised.value)
    assert reward.__name__ in message and example in message and what in message
    assert "\n" not in message
    others = {title for title, *_ in rewards.EXAMPLES} - {example}
    assert not any(repr(title) in message for title in others)


class Judge:
    def __call__(self, completions, **kwargs):
        return tuple(range(len(completions)))


async def awaited(completions, answer, **kwargs):
    await asyncio.sleep(0)
    return [float(gold in text) for text, gold in zip(texts_of(completions), answer, strict=True)]


def compares(completions, trainer_state, **kwargs):
    lengths = [len(text) / (1 + trainer_state.global_step) for text in texts_of(completions)]
    return [length == sorted(lengths)[1] for length in lengths]  # at least two completions


def odd_numbers(completions, **kwargs):
    return [None, True, 3, math.nan, -math.inf, Fraction(1, 2), 0.5][: len(completions)]


def test_rewards_that_trl_accepts():
    weighted = functools.partial(Judge(), weight=2)
    columns = {}

    def logs(completions, log_extra, log_metric, prompts, completion_ids, question, **kwargs):
        columns.update(kwargs, prompts=prompts, ids=completion_ids, question=question)
        log_extra("length", list(map(len, texts_of(completions))))
        log_metric("length", 1.0)
        return [0.0] * len(completions)

    try_rewards([*REWARD_FUNCS, lenient_accuracy, awaited, compares, odd_numbers, weighted, logs])
    assert set(columns) == {"answer", "prompts", "ids", "question", "trainer_state"}
    assert columns["answer"] == ["18"] * 7 and len(columns["prompts"]) == len(columns["ids"]) == 7
    assert columns["prompts"][0][-1] == {"role": "user", "content": columns["question"][0]}


def test_two_rewards_of_one_name():
    one, other = (lambda completions, **kwargs: [1.0] * len(completions) for _ in range(2))
    for twice in ([one, other], [*REWARD_FUNCS, REWARD_FUNCS[0]], [Judge(), Judge()]):
        name = getattr(twice[-1], "__name__", "Judge")
        with pytest.raises(ValueError, match=name):
            try_rewards(twice)
    other.__name__ = "other"
    try_rewards([one, other])


def test_no_reward_at_all():
    with pytest.raises(ValueError, match="REWARD_FUNCS is empty"):
        try_rewards([])


# --- logging accuracy


def test_accuracy_is_logged():
    texts = [PERFECT, "so 18", PERFECT + "I used 2 steps.", "so 19"]
    metrics, extra = {}, {}
    given = batch(texts, ["18"] * 4)
    loggers = {"log_metric": metrics.__setitem__, "log_extra": extra.__setitem__}
    right = lenient_accuracy(**given, question=list("abcd"), **loggers, trainer_state=None)
    assert right == [1.0, 1.0, 1.0, 0.0] and all(isinstance(value, float) for value in right)
    assert metrics == {"accuracy/strict": 0.5, "accuracy/lenient": 0.75}
    assert list(extra) == ["question", "text", "gold", "extracted"]
    assert extra["question"] == list("abcd") and extra["gold"] == ["18"] * 4
    assert extra["text"] == texts and extra["extracted"] == ["18", "so 18", "18", "so 19"]
    extra.clear()
    assert lenient_accuracy(**given, log_extra=extra.__setitem__) == right
    assert list(extra) == ["text", "gold", "extracted"]
    assert lenient_accuracy(**given) == right
    assert lenient_accuracy not in REWARD_FUNCS


# --- hostile texts

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "=", "+", "1", "1,"]
TAGS += [".", "/", "$", "-", "x", "\ud800"]
UNITS = [*TAGS, "1+", "1+1=", "1,000,", "<reasoning>\n</reasoning>\n<answer>\n"]
UNITS += ["1 234 ", "1 1/", r"\frac{1", "^{1", "9{,}", "1e", "1'", r"\,", " -", "$-", "½", "m2"]
UNITS += ["</reasoning> <answer>", "9 x ", "1 a + ", "\n</answer>\n", "</reasoning>\n<answer>\n"]
STARTS = ["", "<reasoning>", "<reasoning>\n", "<reasoning>\na\n</reasoning>\n<answer>\n"]
TAGGED = st.lists(st.sampled_from(TAGS), max_size=60).map("".join)
BYTES = st.binary().map(lambda b: b.decode("latin1"))
HOSTILE = st.one_of(st.text(), TAGGED, BYTES)


def everything(texts: list[str], golds: list[str]) -> None:
    """Give texts to all rewards and scores; what they return must be of the right kind."""
    for function in REWARD_FUNCS:
        values = function(**batch(texts, golds))
        assert len(values) == len(texts)
        assert all(isinstance(value, float) and abs(value) < 1e6 for value in values)
    for text, gold in zip(texts, golds, strict=True):
        assert all(value in (True, False) for value in score(text, gold).values())
        extract_hash_answer(text)


@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(HOSTILE, HOSTILE)
def never_raises(text, gold):
    everything([text], [gold])


def test_hostile_texts_never_raise():
    never_raises()
    rng, some = random.Random(0), 500
    for _ in range(97):  # hypothesis looks for corners, at a hundred times the cost
        texts = ["".join(rng.choices(TAGS, k=rng.randrange(60))) for _ in range(some)]
        everything(texts, ["18"] * some)
        codes = (rng.choices(range(0x3000), k=rng.randrange(40)) for _ in range(some))
        everything(["".join(map(chr, code)) for code in codes], texts)
    tried = f"{3000 + 97 * 2 * some:,}"
    note("hostile completions given to all rewards and measures", tried, tried, "0 exceptions")


def seconds(*texts: str, rounds: int = 1) -> list[float]:
    """Return the processor time of each text in its fastest round; they take turns."""
    times = [[] for _ in texts]
    for _ in range(rounds):
        for text, kept in zip(texts, times, strict=True):
            begun = time.process_time()
            everything([text], ["18"])
            kept.append(time.process_time() - begun)
    return [min(kept) for kept in times]


def test_hostile_texts_take_linear_time():
    """Twice the text takes twice the time; with a quadratic rule it would be four times."""
    size = 20_000
    repeated = [(start, unit * (2 * size // len(unit))) for start in STARTS for unit in UNITS]
    slowest = sorted(repeated, key=lambda parts: seconds("".join(parts)))[-5:]
    for start, units in slowest:
        half, whole = start + units[: len(units) // 2], start + units
        times = seconds(half, whole, rounds=7)
        print(f"{whole[:40]!r}: {times[1]:.4f} s, {times[1] / times[0]:.2f} x half of it")
        assert times[1] / times[0] < 3
