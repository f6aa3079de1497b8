"""Reading numbers and arithmetic in a completion of any form: lenient accuracy, and equations that are true or not.

Nothing here is a reward. The functions never raise and take time linear in the length of the text. No torch here.
"""

import math
import re
from fractions import Fraction

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|(?<![.0-9])\.[0-9]++"
NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z)])[-−]\$?|\$[-−]?)?(?:{DIGITS})(?:/[0-9]++)?")  # no sign in `10-3`
OPERATOR = r"[-−+*/×÷]|\bx\b"
TERM = re.compile(rf"{DIGITS}|{OPERATOR}")
EQUATION = re.compile(
    rf"(?<![0-9.,])((?:(?:{DIGITS})[A-Za-z ]{{0,20}}(?:{OPERATOR})[ $]{{0,3}}){{1,8}}(?:{DIGITS}))"
    rf"[A-Za-z ]{{0,20}}=[ $]{{0,3}}(?=({DIGITS}))"  # the result may begin the next equation
)


def as_number(text: str) -> Fraction | None:
    """`-$1,000.50` or `3/4` as an exact number; None where it is none (`3/0`) or has over 50 characters."""
    try:
        plain = re.sub(r"[,$]", "", text).replace("−", "-")
        return Fraction(plain) if len(text) <= 50 and "e" not in plain.lower() else None  # 1e999999999 takes hours
    except (ValueError, ZeroDivisionError):
        return None


def is_lenient_correct(text: str, gold: str) -> bool:
    """Right in any form: the last number in the text equals the gold answer as a number.

    `1,000`, `$18`, `18.00`, `-3`, `3/4`, `18.` and `18kg` are read as a person reads them. Any text is allowed.
    """
    numbers, want = NUMBER.findall(text), as_number(gold)
    return bool(numbers) and want is not None and as_number(numbers[-1]) == want


def equations(text: str) -> list[bool]:
    """For each arithmetic equation in the text (`3 pens * 4 + 1 = 13`), in order: is it true? Reads no brackets."""
    return [is_true(left, right.replace(",", "")) for left, right in EQUATION.findall(text)]


def is_true(left: str, right: str) -> bool:
    """Does the calculation `left` give the number `right`? A result with decimals may be rounded to them."""
    first, *rest = TERM.findall(left.replace(",", ""))
    terms = [float(first)]  # to be added up; `*` and `/` act on the last one
    for operator, number in zip(rest[::2], map(float, rest[1::2]), strict=True):
        if operator in "+-−":
            terms.append(number if operator == "+" else -number)
        elif operator in "/÷":
            terms[-1] = terms[-1] / number if number else math.nan
        else:
            terms[-1] *= number
    rounding = 0.5 * 10.0 ** -len(right.partition(".")[2]) if "." in right else 0.0
    return abs(sum(terms) - float(right)) <= rounding + 1e-9 * abs(sum(terms))
