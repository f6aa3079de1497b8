"""Every rule of the five rewards, its quirks, and agreement with a second implementation that uses no regexes."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, gsm8k, needs_gsm8k
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from assets.measures import as_number, equations, is_lenient_correct
from rewards import REWARD_FUNCS, count_xml, extract_hash_answer, extract_xml_answer, is_strict_correct

PERFECT = "<reasoning>\nbecause\n</reasoning>\n<answer>\n18\n</answer>\n"


def reward(name: str, text: str, answer: str = "18") -> float:
    completions = [[{"role": "assistant", "content": text}]]
    return getattr(rewards, f"{name}_reward_func")(prompts=[[]], completions=completions, answer=[answer])[0]


def all_five(text: str, answer: str = "18") -> list[float]:
    return [reward(f.__name__.removesuffix("_reward_func"), text, answer) for f in REWARD_FUNCS]


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
        ("x\n<answer>\n5\n</answer>", 0.125 - 0.001 * 22 + 0.125 + 0.001),  # no final newline: all 22, and one too few
        (PERFECT[:-1], 0.5 - 0.001 * len(PERFECT[:-1]) + 0.001),
        (PERFECT + PERFECT, 0.0),  # everything twice
        (PERFECT.replace("because", "x" * 2000)[:-1], 0.5 - 2.047 + 0.001),  # a correct answer far below zero
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
    assert (reward("soft_format", text), reward("strict_format", text)) == (0.5 * soft, 0.5 * strict)


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
    [("a\n#### 18", "18"), ("#### $1,234", "1234"), ("#### -5 ", "-5"), ("none", None), ("#### 1 #### 2", "1")],
)
def test_gold(text, gold):
    assert extract_hash_answer(text) == gold


def no_regex(text: str, gold: str) -> list[float]:
    """The five rewards a second time: positions and slices only."""

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
        return (
            text.startswith("<reasoning>\n") and at >= 0 and any(len(text) - len(e) >= at + len(middle) for e in ends)
        )

    tail = text[text.rfind("<answer>") + 8 :] if "<answer>" in text else text
    answer = tail[: tail.find("</answer>")].strip() if "</answer>" in tail else tail.strip()
    digits = len(answer) > 0 and all(c.isdigit() for c in answer)
    return [xml, 0.5 * soft(), 0.5 * strict(), 0.5 * digits, 2.0 * (answer == gold)]


PIECES = [
    "<reasoning>",
    "</reasoning>",
    "<answer>",
    "</answer>",
    "\n",
    " ",
    "18",
    "-3",
    "x",
    "²",
    "\ud800",
    "\u2028",
    "\x1c",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=24).map("".join)
NEAR = st.lists(st.sampled_from([*PERFECT.replace("\n", " \n ").split(" "), "\n", "18"]), max_size=14).map("".join)


@settings(max_examples=3000, deadline=None)
@given(
    st.one_of(TEXTS, NEAR, st.integers(0, 60).map(lambda i: PERFECT[:i] + PERFECT[i + 1 :])),
    st.sampled_from(["18", "x", ""]),
)
def test_agrees_with_a_second_implementation(text, gold):
    assert all_five(text, gold) == pytest.approx(no_regex(text, gold), abs=1e-9)


@settings(max_examples=1000, deadline=None)
@given(TEXTS)
def test_formats_are_the_gists_patterns(text):
    soft = re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text, re.DOTALL)
    strict = re.match(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", text, re.DOTALL)
    assert [reward("soft_format", text), reward("strict_format", text)] == [0.5 * bool(soft), 0.5 * bool(strict)]


@needs_gsm8k
def test_all_gold_answers_parse():
    golds = [extract_hash_answer(row["answer"]) for row in gsm8k("train")]
    assert len(golds) == 7473 and all(as_number(g) is not None for g in golds)
    assert sum(g.startswith("-") for g in golds) == 3
    assert [sum(not g.isdigit() for g in golds)] == [sum(reward("int", g) == 0 for g in golds)]


# --- what is measured beside the rewards


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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 + 4 = 7", [True]),
        ("3 + 4 = 8", [False]),
        ("3 pens * 4 + 1 = $13", [True]),
        ("2 + 3 * 4 = 14", [True]),
        ("10 - 3 = 7 and 7 / 2 = 3.5", [True, True]),
        ("10 / 3 = 3.33", [True]),  # rounded to its decimals
        ("10 / 3 = 3", [False]),
        ("5 x 6 = 30, 5 × 6 = 31", [True, False]),
        ("$1,000 + $2,500 = $3,500", [True]),
        ("3 + 4 = 7 - 2 = 5", [True, True]),  # a result may begin the next one
        ("1 / 0 = 0", [False]),
        ("x = 5, 7 = 7", []),
        ("the 3 boxes + 4 boxes = 7 boxes", [True]),
    ],
)
def test_equations(text, found):
    assert equations(text) == found


@needs_gsm8k
def test_lenient_and_equations_on_every_gold_solution():
    rows = gsm8k("train") + gsm8k("test")
    assert len(rows) == 8792
    right = steps = valid = 0
    for row in rows:
        solution = re.sub(r"<<.*?>>", "", row["answer"].split("####")[0]).strip()
        right += is_lenient_correct(solution, extract_hash_answer(row["answer"]))
        steps += len(found := equations(solution))
        valid += sum(found)
    print(f"lenient {right}/8792 = {right / 8792:.4f}; {steps} equations, {valid / steps:.4f} of them true")
    # the other 2.8% end in another number than their answer: "... 4 packs of 10 cupcakes", "700 pages in 7 days"
    assert f"finds the gold answer in {right / 8792:.1%}" in (ROOT / "README.md").read_text()
    assert right / 8792 > 0.97 and steps / 8792 > 3 and valid / steps > 0.98


@settings(max_examples=3000, deadline=None)
@given(st.text(), st.text())
def test_measures_never_raise(text, gold):
    assert is_lenient_correct(text, gold) in (True, False)
    assert all(e in (True, False) for e in equations(text))
    assert set(rewards.score(text, gold)) == {"strict_format", "soft_format", "strict_accuracy", "lenient_accuracy"}


def test_log_metric_and_log_extra():
    metrics, extra = {}, {}
    texts = [PERFECT, "9 * 2 = 18, so 18", "9 * 2 = 17", "no"]
    got = rewards.simple_correctness_reward_func(
        prompts=[[]] * 4,
        completions=[[{"role": "assistant", "content": t}] for t in texts],
        answer=["18"] * 4,
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
        trainer_state=None,
    )
    assert got == [2.0, 0.0, 0.0, 0.0]
    assert metrics == {
        "accuracy/strict": 0.25,
        "accuracy/lenient": 0.5,
        "reasoning/steps": 0.5,
        "reasoning/valid_steps": 0.5,
    }
    assert extra == {"gold": ["18"] * 4, "extracted": ["18", *texts[1:]]}


def test_no_torch_and_a_table_that_teaches():
    code = "import sys, rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    lines = subprocess.run([sys.executable, "rewards.py"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 8
    for line, (name, text, _) in zip(lines[1:], rewards.EXAMPLES, strict=True):
        assert name in line and all(f"{value:.3f}" in line for value in [*all_five(text), sum(all_five(text))])
