"""The five reward functions of willccbb's `grpo_demo.py`, and strict and lenient accuracy.

`python rewards.py` prints what they give seven examples. TRL calls a reward with `completions`,
each `[{"role": "assistant", "content": text}]`, and the data's columns (`answer`: gold answers).
Source: gist.github.com/willccbb/4676755236bb08cab5f4e54a0475d6fb
"""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from fractions import Fraction
from types import SimpleNamespace

# (?s): the dot matches newlines too. (?>...), ++ and *+ do not backtrack: linear time
SOFT_FORMAT = re.compile(r"(?s)<reasoning>(?>.*?</reasoning>\s*<answer>).*?</answer>")
STRICT_FORMAT = re.compile(r"(?s)^<reasoning>\n(?>.*?\n</reasoning>\n<answer>\n).*?\n</answer>\n$")


def extract_xml_answer(text: str) -> str:
    """Return the text after the last `<answer>`, cut at `</answer>`; without tags, all (gist)."""
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def extract_hash_answer(text: str) -> str | None:
    """Return GSM8K's gold answer: the text after `####` without `,` and `$`, or None (gist)."""
    gold = text.split("####")[1:2]
    return gold[0].strip().replace(",", "").replace("$", "") if gold else None


def count_xml(text: str) -> float:
    """Return 0.125 for each tag, minus 0.002 per character after `\\n</answer>\\n`."""
    count = 0.125 * sum(text.count(tag) == 1 for tag in ("<reasoning>\n", "\n</reasoning>\n"))
    if text.count("\n<answer>\n") == 1:  # without the final newline, 0.001 for all characters
        count = count + 0.125 - len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        count = count + 0.125 - (len(text.split("\n</answer>")[-1]) - 1) * 0.001
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
REWARD_FUNCS = [
    xmlcount_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    int_reward_func,
    simple_correctness_reward_func,
]

# To measure only. Typeset -> plain, in order; last: exponents of units, full hours, decimal commas
PLAIN = {r"[−–‒‑]|\b(?i:negative|minus) (?=[$\d])": "-", r"\\!|\{(?=[,.]\})|(?<=\{[,.])\}": ""}
PLAIN |= {r"\{\\,\}|\\[,;: ]|[~\u00a0\u2007\u2009\u202f]": " ", "= - ": "= -", "<sup>": "^"}
PLAIN |= {r"\\?[$€£¥₹]": "$", r"\\times|\\cdot|×": "*", r"\\div|[÷⁄]": "/", r"\\sqrt\{": "√"}
PLAIN |= {"²": "^2", "³": "^3", "½": r"\\frac12", "¼": r"\\frac14", "¾": r"\\frac34", r"\\pi": "π"}
PLAIN |= {"’": "'", r"(?<=\d)(?=\\[a-z]?frac)": " "}  # 1\frac12 is a mixed number
PLAIN |= {r"\\[a-z]{0,4}frac(?:\{(-?[\d., ]++)\}\{(\d++)\}|(\d)(\d))": r"\1\3/\2\4"}
PLAIN |= {r"(?<=[A-Za-z}%)])\^[{(]?-?\d++|(?<=[mt])[23]\b|(?<=\d):00\b": ""}
PLAIN |= {r"(?<![\d.,])(\d{1,9}),(\d\d?)(?![,.]?\d)": r"\1.\2"}
# All that joins digits makes one number or none: of `5-10`, `2:30`, `18^2` no part is read
SIGN = r"(?:(?<![\w%)°])-)?(?:\$ ?-?)?"
JOIN = r"[.,'_]|:(?!\d{3})|[$%]? ?[-+*/x] ?[$√-]*|\^[{(]?-?|e[-+]?| (?:and )?(?=\d{3}(?!\d)|\d+ ?/)"
TOKEN = re.compile(rf"(?i){SIGN}√?(?:\d|(?<![\w.])\.\d)\d*+(?:(?:{JOIN})\d++)*+(?: ?π|k\b)?")
WHOLE = r"(?:(?!0)\d{1,3}(?:[,'_ ]\d{2,3})*[,'_ ]\d{3}|\d+)"
MIXED = r"(?:(\d+) (?:and )?(?=\d+ ?/))?"
NUMBER = re.compile(rf"({SIGN}){MIXED}({WHOLE}(?:\.\d+)?|\.\d+)(?: ?/ ?([1-9]\d*))?")
MARKS = [  # what each finds is an answer; headings such as `#### 2. Costs` are none
    r"<answer>((?:[^<]++|<(?!/?answer>))*+)",
    r"\\f?boxed\{((?:[^{}]|\{[^{}]*+\})*+)",
    r"####(?! *\d+[.):] +[A-Z])([^\w\n]{0,9}+\d.*)",
    r"(?i)\banswers?\b(?:[^.\n\d]{0,40}?\b(?:is|are|be)\b|[^\w.]{0,5}?[:=\n])"
    r"([^.\d]{0,80}+\.?\d(?:[^.\n]|\.(?=\d))*+)",
]
LEAD = re.compile(r"(?:\\[A-Za-z]+|about\b|approximately\b|[^\w.√-])*+")


def as_number(text: str) -> Fraction | None:
    """Return `-$1,000.50`, `3/4` or `1 1/2` as an exact number; None for `38,5`, `18^2` or text."""
    match = NUMBER.fullmatch(text.strip()) if len(text) <= 50 else None
    if not match:
        return None
    sign, whole, top, bottom = match.groups("")
    value = int(whole or 0) + Fraction(re.sub("[ ,'_]", "", top)) / int(bottom or 1)
    return -value if "-" in sign else value


def final_number(text: str) -> str:
    """Return the final number. The text is narrowed to `<answer>`, a box, `####`, `answer is`."""
    marked = False
    for typeset, typed in PLAIN.items():
        text = re.sub(typeset, typed, text)
    for mark in MARKS:
        if found := [part for part in re.findall(mark, text) if re.search(r"\w", part)]:
            text, marked = found[-1], True
    result = re.sub(r"\([^()]*+\)", "", text).split("=")[-1]
    for part in [result, text, re.split(r":\s|\bis\b", text)[-1]] if marked else []:
        first = TOKEN.match(LEAD.sub("", part, count=1))
        if first and as_number(first[0]) is not None:
            return first[0]
    return ["", *TOKEN.findall(text)][-1]


def score(text: str, gold: str) -> dict[str, bool]:
    """Return the four yes/no scores used in evaluation."""
    closed = "<answer>" in text and "</answer>" in text.split("<answer>")[-1]
    strict = closed and extract_xml_answer(text) == gold
    number = as_number(final_number(text))
    return {
        "strict_format": bool(STRICT_FORMAT.match(text)),
        "soft_format": bool(SOFT_FORMAT.match(text)),
        "strict_accuracy": strict,
        "lenient_accuracy": strict or (number is not None and number == as_number(gold)),
    }


def lenient_accuracy(completions, answer, question, log_metric, log_extra, **kwargs) -> list[float]:
    """Return 1.0 if lenient correct, else 0; log both accuracies and the completions."""
    texts = [c[0]["content"] for c in completions]
    scores = [score(text, gold) for text, gold in zip(texts, answer, strict=True)]
    extra = {"question": question, "text": texts, "gold": answer}
    for name, values in (extra | {"extracted": [*map(extract_xml_answer, texts)]}).items():
        log_extra(name, values)
    for kind in ("strict", "lenient"):
        log_metric(f"accuracy/{kind}", sum(s[f"{kind}_accuracy"] for s in scores) / len(texts))
    return [float(s["lenient_accuracy"]) for s in scores]


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


def try_rewards(reward_funcs: list, row: dict | None = None) -> dict[str, list[float | None]]:
    """Return name -> rewards of the examples, called as TRL does; `row` has the other columns."""
    row = {**(row or {}), "question": "What is 9 times 2?", "answer": "18", "completion_ids": [0]}
    row["prompts"] = [{"role": "user", "content": row["question"]}]
    found, size = {}, len(EXAMPLES)
    given = {name: [value] * size for name, value in row.items() if name != "prompt"}
    given["completions"] = [[{"role": "assistant", "content": text}] for _, text, _ in EXAMPLES]
    given |= dict.fromkeys(["log_extra", "log_metric"], lambda *args: None)
    given["trainer_state"] = SimpleNamespace(global_step=0, max_steps=1)
    for reward in reward_funcs:
        inner = getattr(reward, "func", reward)  # of a functools.partial
        name = getattr(inner, "__name__", type(inner).__name__)
        columns = deepcopy(given)
        try:
            got = reward(**columns)
            if asyncio.iscoroutine(got):  # in a thread: a notebook's own runs a loop already
                got = ThreadPoolExecutor().submit(asyncio.run, got).result()
        except Exception as error:
            raise RuntimeError(f"{name} fails on the examples of rewards.py") from error
        is_list = hasattr(got, "__len__") and not isinstance(got, dict) and len(got) == size
        if not is_list or not all(x is None or hasattr(x, "__float__") for x in got):
            raise ValueError(f"{name} returned {got!r:.99}, not {size} numbers for {size} texts")
        if columns != given or name in found:
            raise ValueError(f"{name} edits what it is given, or another reward has its name")
        found[name] = got
    return found


def main() -> None:
    """Print what each reward gives the seven examples; names are cut to eight letters."""
    columns = try_rewards(REWARD_FUNCS)
    names = [re.sub("simple_|(ness|_format)?_reward_func", "", name) for name in columns]
    print("gold answer: 18".rjust(17), *(f"{name:>8.8}" for name in [*names, "sum"]))
    for (title, text, comment), *row in zip(EXAMPLES, *columns.values(), strict=True):
        row = [float(value or 0) for value in row]
        print(f"\n{title:>17}", *(f"{value:8.3f}" for value in [*row, sum(row)]))
        print(f"  {comment}:\n  {text!r}")


if __name__ == "__main__":
    main()
