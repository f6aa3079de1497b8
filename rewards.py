"""The five reward functions of willccbb's `grpo_demo.py`, and the four scores of the evaluation.

    python rewards.py      # seven example completions and how each reward scores them

Source: gist.github.com/willccbb/4676755236bb08cab5f4e54a0475d6fb. Standard library only. TRL calls
each reward with lists, one entry per completion, and expects one float per completion:

    reward(prompts=..., completions=..., answer=..., **kwargs) -> list[float]

    completions  [{"role": "assistant", "content": text}] each
    answer       the gold answer of each, a string
    kwargs       other columns of the dataset and TRL's own arguments; ignored

A perfect completion earns 4.0. No function raises an exception, whatever the text.
"""

import asyncio
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import SimpleNamespace

# `(?s)` lets the dot match newlines; without it multi-line reasoning never earns a format reward.
# `++`, `*+` and `(?>...)` do not backtrack: same matches, linear time on hostile input.
SOFT_FORMAT = re.compile(
    r"(?s)<reasoning>(?:[^<]++|<(?!/reasoning>\s*<answer>))*+</reasoning>\s*<answer>.*?</answer>"
)
STRICT_FORMAT = re.compile(r"(?s)^<reasoning>\n(?>.*?\n</reasoning>\n<answer>\n).*?\n</answer>\n$")
# What TeX, HTML and Unicode write for a plain character, replaced in this order
TYPESET = dict(zip("−–‒‑⁄’€£¥~\u00a0\u2007\u2009\u202f", "----/'$$$     ", strict=True))
TYPESET |= {r"\!": "", r"\,": " ", r"\;": " ", r"\:": " ", r"\ ": " ", "{,}": ",", "{ }": " "}
TYPESET |= {r"\$": "$", "<sup>": "^", "½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34"}
SIGN = r"(?:(?<![0-9)])\$-|(?<![-0-9A-Za-z)%°$²³])(?<![0-9%] )-)?(?:\$ ?)?"  # none in `10-3`
SPACED = r"[1-9][0-9]{0,2}(?: [0-9]{3}(?![0-9]|-[A-Za-z]))++"  # 9 500, but not `9 500-page`
INTEGER = rf"(?:[0-9]{{1,3}}(?:[,'][0-9]{{3}}(?![0-9]))++|{SPACED}|[0-9]++)"
DECIMAL = rf"{INTEGER}(?:\.[0-9]++)?|(?<![.0-9A-Za-z])\.[0-9]++"
NUMBER = re.compile(
    rf"(?P<sign>{SIGN})(?:(?P<whole>{INTEGER}) (?=[0-9]++/[0-9]))?(?P<top>{DECIMAL})"
    r"(?:/(?P<bottom>[0-9]++))?(?P<power>[²³]|(?:\^[{(]?|[eE])[-+]?[0-9]++)?"
)


def extract_xml_answer(text: str) -> str:
    """Return the text after the last `<answer>`, cut at `</answer>`; without tags, all (gist)."""
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def extract_hash_answer(text: str) -> str | None:
    """Return GSM8K's gold answer: the text after `####` without `,` and `$`, or None (gist)."""
    if "####" not in text:
        return None
    return text.split("####")[1].strip().replace(",", "").replace("$", "")


def count_xml(text: str) -> float:
    """Return the gist's partial credit: 0.125 per tag, minus a penalty for text after the end.

    Each character after the end costs 0.002: two splits charge 0.001 each. Without the final
    newline the first one returns the whole text, so its full length is penalized.
    """
    count = 0.0
    if text.count("<reasoning>\n") == 1:
        count += 0.125
    if text.count("\n</reasoning>\n") == 1:
        count += 0.125
    if text.count("\n<answer>\n") == 1:
        count += 0.125
        count -= len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        count += 0.125
        count -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001  # the final newline is free
    return count


def xmlcount_reward_func(completions: list, **kwargs) -> list[float]:
    """Return `count_xml` of each completion: at most 0.5, no lower bound."""
    return [count_xml(c[0]["content"]) for c in completions]


def soft_format_reward_func(completions: list, **kwargs) -> list[float]:
    """Return 0.5 if the text starts with a reasoning and an answer block, else 0."""
    return [0.5 if SOFT_FORMAT.match(c[0]["content"]) else 0.0 for c in completions]


def strict_format_reward_func(completions: list, **kwargs) -> list[float]:
    """Return 0.5 if every tag has its own line and at most one blank line follows, else 0."""
    return [0.5 if STRICT_FORMAT.match(c[0]["content"]) else 0.0 for c in completions]


def int_reward_func(completions: list, **kwargs) -> list[float]:
    """Return 0.5 if the extracted answer is all digits (`str.isdigit`: not `-3`, not `1,000`)."""
    return [0.5 if extract_xml_answer(c[0]["content"]).isdigit() else 0.0 for c in completions]


def simple_correctness_reward_func(completions: list, answer: list[str], **kwargs) -> list[float]:
    """Return 2.0 if the extracted answer is exactly the gold string, else 0."""
    extracted = [extract_xml_answer(c[0]["content"]) for c in completions]
    return [2.0 if got == gold else 0.0 for got, gold in zip(extracted, answer, strict=True)]


correctness_reward_func = simple_correctness_reward_func  # its name in the gist
REWARD_FUNCS = [  # in the gist's order
    xmlcount_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    int_reward_func,
    simple_correctness_reward_func,
]


def plain(text: str) -> str:
    """Return the text with its numbers in plain characters, without the exponents of units."""
    for typeset, typed in TYPESET.items():
        text = text.replace(typeset, typed)
    text = re.sub(r"\\(?<=[0-9]\\)", r" \\", text)  # 1\frac12 is a mixed number
    fraction = r"\\[a-z]{0,4}frac(?:\{(-?[0-9.,]++)\}\{([0-9]++)\}|([0-9])([0-9]))"
    text = re.sub(fraction, r"\1\3/\2\4", text)
    text = re.sub(r"m[23](?![,.]?[0-9])", "m", text)
    return re.sub(r"\^(?<![0-9]\^)[{(]?-?[0-9]++", "", text)


def as_number(text: str) -> Fraction | None:
    """Return `-$1,000.50`, `3/4` or `1 1/2` as an exact number; None if it is not one, or too long.

    A power is not read: 1e999999999 could take hours.
    """
    match = NUMBER.fullmatch(plain(text.strip())) if len(text) <= 50 else None
    if not match or match["power"] or not int(match["bottom"] or 1):
        return None
    value = Fraction(re.sub("[ ,']", "", match["top"])) / int(match["bottom"] or 1)
    if match["whole"] and value < 1:  # in `10 20/5` the 10 is another number
        value += int(re.sub("[ ,']", "", match["whole"]))
    return -value if "-" in match["sign"] else value


def last_number(text: str) -> str:
    """Return the last number in the text, in plain characters; '' if there is none."""
    text = plain(text)
    end = 1 + max(map(text.rfind, "0123456789"))
    start = len(text[:end].rstrip("-$0123456789.,'/ ^{(eE+²³"))  # the regex sees what is before
    numbers = [match.group() for match in NUMBER.finditer(text, start, end + 2)]
    return numbers[-1] if numbers else ""


def is_strict_correct(text: str, gold: str) -> bool:
    """Return whether the text inside the last `<answer>...</answer>` is exactly the gold string."""
    _, opened, tail = text.rpartition("<answer>")
    return bool(opened) and "</answer>" in tail and extract_xml_answer(text) == gold


def is_lenient_correct(text: str, gold: str) -> bool:
    """Return whether the last number in the text equals the gold answer, or strict accuracy holds.

    `1,000`, `9{,}500`, `$18`, `18.00`, `-3`, `3/4`, `1 1/2` and `18 m^2` are read as a person does.
    `9 500` is one number, in a list too; `0 500`, `9 500-page` and `2024 500` are two.
    A dash after a number (`5-10`, `5 –10`) is no sign. Powers (`18^2`, `1e3`) equal nothing.
    """
    want = as_number(gold)
    right = want is not None and as_number(last_number(text)) == want
    return right or is_strict_correct(text, gold)


def lenient_accuracy(
    completions: list, answer: list[str], question=None, log_metric=None, log_extra=None, **kwargs
) -> list[float]:
    """Return 1.0 if lenient correct, else 0. Logged with weight 0, it earns nothing.

    TRL's two functions log strict and lenient accuracy, and the columns of the completions table.
    """
    texts = [c[0]["content"] for c in completions]
    strict = [float(is_strict_correct(t, gold)) for t, gold in zip(texts, answer, strict=True)]
    lenient = [float(is_lenient_correct(t, gold)) for t, gold in zip(texts, answer, strict=True)]
    if log_metric:
        log_metric("accuracy/strict", sum(strict) / len(texts))
        log_metric("accuracy/lenient", sum(lenient) / len(texts))
    extracted = [extract_xml_answer(text) for text in texts]
    columns = {"question": question, "text": texts, "gold": answer, "extracted": extracted}
    for name, values in columns.items():
        if log_extra and values is not None:
            log_extra(name, values)
    return lenient


def score(text: str, gold: str) -> dict[str, bool]:
    """Return the four yes/no scores used in evaluation."""
    return {
        "strict_format": bool(STRICT_FORMAT.match(text)),
        "soft_format": bool(SOFT_FORMAT.match(text)),
        "strict_accuracy": is_strict_correct(text, gold),
        "lenient_accuracy": is_lenient_correct(text, gold),
    }


XML = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n"
EXAMPLES = [  # name, completion, comment; the gold answer is 18
    ("perfect", XML.format("9 * 2 = 18", "18"), "tags on their own lines, gold answer"),
    ("no final newline", XML.format("9 * 2 = 18", "18")[:-1], "xmlcount subtracts 0.001 x 56"),
    ("a tag too many", XML.format("9 * 2 = 18", "18") + "</reasoning>", "only 0.001 x 24: a hole"),
    ("one line", "<reasoning>9 * 2 = 18</reasoning> <answer>18</answer>", "soft needs no newlines"),
    ("plain prose", "9 eggs for $2: 9 * 2 = 18. The answer is 18.", "right, but not in tags"),
    ("wrong answer", XML.format("9 + 2 = 11", "11"), "half the reward is for the format"),
    ("negative answer", XML.format("9 - 27 = -18", "-18"), "a minus sign is not a digit"),
]


def call_reward(reward: Callable, texts: list[str]) -> Sequence:
    """Return the rewards of texts with gold answer 18; the reward is called as TRL calls it."""
    got = reward(
        prompts=[[{"role": "user", "content": "What is 9 times 2?"}] for _ in texts],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=[[0] for _ in texts],
        question=["What is 9 times 2?"] * len(texts),
        answer=["18"] * len(texts),
        trainer_state=SimpleNamespace(global_step=0, max_steps=1),
        log_extra=lambda *args: None,
        log_metric=lambda *args: None,
    )
    return asyncio.run(got) if asyncio.iscoroutine(got) else got


def name_of(reward: Callable) -> str:
    """Return the name TRL logs a reward under."""
    reward = getattr(reward, "func", reward)  # what functools.partial wraps
    return getattr(reward, "__name__", type(reward).__name__)


def fault(reward: Callable, texts: list[str]) -> str:
    """Return what is wrong with the rewards of texts; '' if nothing."""
    try:
        got = call_reward(reward, texts)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    is_list = hasattr(got, "__getitem__") and not isinstance(got, (str, dict))
    if not is_list or len(got) != len(texts):
        return f"returned {got!r:.60}, not a list of {len(texts)} rewards"
    wrong = [value for value in got if value is not None and not hasattr(value, "__float__")]
    return f"returned {wrong[0]!r:.60}, not a number" if wrong else ""


def try_rewards(reward_funcs: list[Callable]) -> None:
    """Call each reward on the seven examples; ValueError names the reward that fails, and where.

    Rewards may compare completions, so an example is tried alone only to name the one that fails.
    """
    if not reward_funcs:
        raise ValueError("REWARD_FUNCS is empty")
    names = [name_of(reward) for reward in reward_funcs]
    for reward, name in zip(reward_funcs, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"two rewards are named {name}: give them different names")
        if wrong := fault(reward, [text for _, text, _ in EXAMPLES]):
            alone = [(title, fault(reward, [text])) for title, text, _ in EXAMPLES]
            failed = [f"example {title!r}: {found}" for title, found in alone if found]
            message = f"reward {name}, {[*failed, f'all examples together: {wrong}'][0]}"
            raise ValueError(" ".join(message.split()))


def main() -> None:
    """Print what each reward gives the seven examples; exit with status 2 if one fails."""
    try:
        try_rewards(REWARD_FUNCS)
    except ValueError as error:
        print(f"rewards.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    texts = [text for _, text, _ in EXAMPLES]
    columns = [call_reward(reward, texts) for reward in REWARD_FUNCS]
    short = {"soft_format": "soft", "strict_format": "strict", "simple_correctness": "correct"}
    names = [name_of(reward).removesuffix("_reward_func") for reward in REWARD_FUNCS]
    names = [f" {short.get(name, name):>8}" for name in [*names, "sum"]]
    print(f"{'gold answer: 18':>17}" + "".join(names))
    for (title, text, comment), *row in zip(EXAMPLES, *columns, strict=True):
        rewards = [0.0 if value is None else float(value) for value in row]
        values = zip(names, [*rewards, sum(rewards)], strict=True)
        cells = "".join(f"{value:{len(name)}.3f}" for name, value in values)
        print(f"\n{title:>17}{cells}\n  {comment}:\n  {text!r}")


if __name__ == "__main__":
    main()
