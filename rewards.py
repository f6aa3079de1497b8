"""The five reward functions of willccbb's `grpo_demo.py`, rule for rule, and what is measured beside them.

    python rewards.py      # seven example completions: what each reward gives them, and why

Every reward takes TRL's keyword arguments and returns one float per completion, higher is better:

    reward(prompts=..., completions=..., answer=..., **kwargs) -> list[float]

    prompts      one conversation per completion: [{"role": ..., "content": ...}, ...]
    completions  one message list per completion: [{"role": "assistant", "content": text}]
    answer       the gold answers, one string per completion
    kwargs       other dataset columns, and TRL 1.16's `log_extra` and `log_metric`; all optional

They never raise, whatever the text, and take time linear in its length. A perfect completion earns 4.0. No torch here.
"""

import re

from assets.measures import equations, is_lenient_correct

# `(?s)`: the dot matches newlines; without it multi-line reasoning never matches and both format rewards stay at 0.
# `++`, `*+` and `(?>...)` keep their first match: the same texts match as in the gist, but hostile ones take no
# quadratic time.
SOFT_FORMAT = re.compile(r"(?s)<reasoning>(?:[^<]++|<(?!/reasoning>\s*<answer>))*+</reasoning>\s*<answer>.*?</answer>")
STRICT_FORMAT = re.compile(r"(?s)^<reasoning>\n(?>.*?\n</reasoning>\n<answer>\n).*?\n</answer>\n$")


def extract_xml_answer(text: str) -> str:
    """What follows the last `<answer>`, up to `</answer>`, stripped; the whole text where there is no tag (gist)."""
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def extract_hash_answer(text: str) -> str | None:
    """GSM8K's gold answer: what follows `####`, without `,` and `$`; None where there is no `####` (gist)."""
    if "####" not in text:
        return None
    return text.split("####")[1].strip().replace(",", "").replace("$", "")


def count_xml(text: str) -> float:
    """The gist's partial credit: 0.125 for each tag on a line of its own, minus 0.001 per character after the end.

    A text without `\\n</answer>\\n` is charged its whole length: without its final newline a long answer loses more
    than all tags earn. With a newline and any short text after it, it loses next to nothing.
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
        count -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001  # one character is free: the final newline
    return count


def xmlcount_reward_func(completions: list, **kwargs) -> list[float]:
    """At most 0.5, without a lower bound: `count_xml` of each completion."""
    return [count_xml(c[0]["content"]) for c in completions]


def soft_format_reward_func(completions: list, **kwargs) -> list[float]:
    """0.5 where the completion begins with a reasoning block followed by an answer block, spaced anyhow."""
    return [0.5 if SOFT_FORMAT.match(c[0]["content"]) else 0.0 for c in completions]


def strict_format_reward_func(completions: list, **kwargs) -> list[float]:
    """0.5 where every tag is on a line of its own and nothing but one newline follows (`$` allows a second)."""
    return [0.5 if STRICT_FORMAT.match(c[0]["content"]) else 0.0 for c in completions]


def int_reward_func(completions: list, **kwargs) -> list[float]:
    """0.5 where the extracted answer is digits only (`str.isdigit`: `²` and `٣` count, `-3` and `1,000` do not)."""
    return [0.5 if extract_xml_answer(c[0]["content"]).isdigit() else 0.0 for c in completions]


def simple_correctness_reward_func(completions: list, answer: list[str], **kwargs) -> list[float]:
    """2.0 where the extracted answer is the gold string, exactly.

    Logs what the gist printed as columns `gold` and `extracted` of TRL's completions table, and as metrics
    `accuracy/strict`, `accuracy/lenient` (shares), `reasoning/steps` (equations a completion) and
    `reasoning/valid_steps` (share of the equations that are true; absent where there are none).
    """
    texts = [c[0]["content"] for c in completions]
    extracted = [extract_xml_answer(text) for text in texts]
    if log_extra := kwargs.get("log_extra"):
        log_extra("gold", list(answer))
        log_extra("extracted", extracted)
    if log_metric := kwargs.get("log_metric"):
        steps = [step for text in texts for step in equations(text)]
        log_metric("accuracy/strict", sum(map(is_strict_correct, texts, answer)) / len(texts))
        log_metric("accuracy/lenient", sum(map(is_lenient_correct, texts, answer)) / len(texts))
        log_metric("reasoning/steps", len(steps) / len(texts))
        if steps:
            log_metric("reasoning/valid_steps", sum(steps) / len(steps))
    return [2.0 if got == gold else 0.0 for got, gold in zip(extracted, answer, strict=True)]


correctness_reward_func = simple_correctness_reward_func  # the gist's own name for it
REWARD_FUNCS = [  # in the order in which the gist wires them
    xmlcount_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    int_reward_func,
    simple_correctness_reward_func,
]


def is_strict_correct(text: str, gold: str) -> bool:
    """Right in the asked-for form: the text inside the last `<answer>...</answer>` is the gold string."""
    return "</answer>" in text.rpartition("<answer>")[2] and "<answer>" in text and extract_xml_answer(text) == gold


def score(text: str, gold: str) -> dict[str, bool]:
    """What the evaluation asks of one completion."""
    return {
        "strict_format": bool(STRICT_FORMAT.match(text)),
        "soft_format": bool(SOFT_FORMAT.match(text)),
        "strict_accuracy": is_strict_correct(text, gold),
        "lenient_accuracy": is_lenient_correct(text, gold),
    }


EXAMPLES = [  # the gold answer is 18
    ("perfect", "<reasoning>\n9 * 2 = 18\n</reasoning>\n<answer>\n18\n</answer>\n", "tags on their own lines, gold"),
    ("no final newline", "<reasoning>\n9 * 2 = 18\n</reasoning>\n<answer>\n18\n</answer>", "xmlcount takes 0.001 x 56"),
    (
        "a tag too many",
        "<reasoning>\n9 * 2 = 18\n</reasoning>\n<answer>\n18\n</answer>\n</reasoning>",
        "only 0.001 x 24: a hole",
    ),
    (
        "one line",
        "<reasoning>9 * 2 = 18</reasoning> <answer>18</answer>",
        "soft needs no newlines",
    ),
    ("plain prose", "9 eggs for $2: 9 * 2 = 18. The answer is 18.", "right, but without tags nobody can read it"),
    (
        "wrong answer",
        "<reasoning>\n9 + 2 = 11\n</reasoning>\n<answer>\n11\n</answer>\n",
        "half the reward is for form",
    ),
    (
        "negative answer",
        "<reasoning>\n9 - 27 = -18\n</reasoning>\n<answer>\n-18\n</answer>\n",
        "a minus sign is no digit",
    ),
]


def main() -> None:
    """Print what each reward gives the seven examples."""
    short = [f.__name__.removesuffix("_reward_func").removeprefix("simple_") for f in REWARD_FUNCS]
    print("".join(f"{name:>16}" for name in ["gold answer: 18", *short]) + "     sum  why")
    for name, text, why in EXAMPLES:
        got = [f(completions=[[{"role": "assistant", "content": text}]], answer=["18"])[0] for f in REWARD_FUNCS]
        print(f"{name:>16}" + "".join(f"{reward:16.3f}" for reward in got) + f"{sum(got):8.3f}  {why}: {text!r}")


if __name__ == "__main__":
    main()
