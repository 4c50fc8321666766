"""Plain numbers: integers, decimals, scientific notation, fractions and mixed numbers, percentages.

Everything here is exact and bounded, and so may be called anywhere; what it cannot tell it leaves to `grading`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

LONGEST = 2000
"""Characters of an answer beyond which only identical texts are equal."""

RELATIVE = Fraction(2, 10**6)
ABSOLUTE = Fraction(5, 10**7)
"""A decimal stands for a value when it differs by at most both of these: 0.333333 for 1/3, and
57.99999999999999 for 58, but not 1.2e-7 for 0."""

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"(?P<whole>\d{1,60})(?P<part>\.\d{0,60})?|(?P<only>\.\d{1,60})|"
    r"(?P<thousands>\d{1,3}(?:,\d{3}){1,19})(?P<tpart>\.\d{0,60})?"
    r")(?:[eE](?P<exponent>[+-]?\d{1,3}))?(?P<percent>\\?%)?"
)
_RATIO = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<whole>\d{1,30})(?: +(?=\d)|(?=\\frac)))?"
    r"(?:\\frac\{(?P<tsign>[+-]?)(?P<top>\d{1,60})\}\{(?P<bottom>\d{1,60})\}|"
    r"(?P<ptop>\d{1,60})/(?P<pbottom>\d{1,60}))"
)
_SCIENTIFIC = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<mantissa>\d{1,60}(?:\.\d{0,60})?|\.\d{1,60}) ?(?:\\times|\\cdot|\*) ?)?10 ?"
    r"(?:\^ ?(?:\{ ?(?P<braced>[+-]?\d{1,3}) ?\}|(?P<bare>-?\d))|(?:\*\*|\^)\(?(?P<plain>[+-]?\d{1,3})\)?)"
)
r"""1.2\times10^{-5}, 10^5, 10**-5. In LaTeX an exponent without braces is a single digit."""
_REPEATING = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d{0,30})\.(?P<part>\d{0,30})\\(?:overline|bar|dot) ?"
    r"(?:\{ ?(?P<period>\d{1,30}) ?\}|(?P<digit>\d))"
)


class Number:
    """A plain number: its value, whether it was written as a decimal, whether as a percentage."""

    __slots__ = ("decimal", "percent", "value")

    def __init__(self, value: Fraction, decimal: bool, percent: bool) -> None:
        self.value, self.decimal, self.percent = value, decimal, percent


@lru_cache(maxsize=1 << 14)
def read_number(text: str) -> Number | None:
    """`text` as a plain number (integer, decimal, scientific, fraction, mixed number), if it is one."""
    if len(text) > 200:
        return None
    match = _NUMBER.fullmatch(text)
    if match:
        if match["thousands"]:
            digits = match["thousands"].replace(",", "") + (match["tpart"] or "")
        else:
            digits = (match["whole"] or "") + (match["part"] or match["only"] or "")
        exponent = int(match["exponent"] or 0)
        value = Fraction(match["sign"] + digits.rstrip(".")) * Fraction(10) ** exponent
        return Number(value, "." in digits or match["exponent"] is not None, match["percent"] is not None)
    match = _RATIO.fullmatch(text)
    if match:
        bottom = int(match["bottom"] or match["pbottom"])
        if bottom == 0:
            return None
        value = Fraction(int(match["top"] or match["ptop"]), bottom)
        if match["tsign"] == "-":
            value = -value
        if match["whole"]:
            if match["tsign"] or value >= 1:
                return None
            value += int(match["whole"])
        return Number(-value if match["sign"] == "-" else value, False, False)
    return _scientific(text) or _repeating(text)


def _scientific(text: str) -> Number | None:
    """A number that is written as a multiple of a power of ten."""
    match = _SCIENTIFIC.fullmatch(text)
    if not match or ("\\" in text and match["plain"] and len(match["plain"]) > 1):
        return None
    mantissa = match["mantissa"] or "1"
    value = Fraction(mantissa.rstrip(".")) * Fraction(10) ** int(match["braced"] or match["bare"] or match["plain"])
    return Number(-value if match["sign"] == "-" else value, "." in mantissa, False)


def _repeating(text: str) -> Number | None:
    """A decimal whose last digits repeat for ever: exactly the fraction that it is."""
    match = _REPEATING.fullmatch(text)
    if not match:
        return None
    part, period = match["part"], match["period"] or match["digit"]
    value = Fraction(int((match["whole"] or "0") + part)) + Fraction(int(period), 10 ** len(period) - 1)
    value /= 10 ** len(part)
    return Number(-value if match["sign"] == "-" else value, False, False)


def _close(a: Fraction, b: Fraction, decimal: bool) -> bool:
    if a == b:
        return True
    difference = abs(a - b)
    return decimal and difference <= ABSOLUTE and difference <= RELATIVE * max(abs(a), abs(b))


def numbers_equal(a: Number, b: Number) -> bool:
    """Equal as numbers; a percentage also equals its bare number (as a unit) and its hundredth."""
    decimal = a.decimal or b.decimal
    if _close(a.value, b.value, decimal):
        return True
    if a.percent and not b.percent:
        return _close(a.value / 100, b.value, decimal)
    if b.percent and not a.percent:
        return _close(a.value, b.value / 100, decimal)
    return False


def quick_equiv(a: str, b: str) -> bool | None:
    """Equality where it can be told exactly and at once: identical texts, plain numbers. Else None."""
    a, b = a.strip(), b.strip()
    if a == b:
        return bool(a)
    if not a or not b or len(a) > LONGEST or len(b) > LONGEST:
        return False
    first, second = read_number(a), read_number(b)
    return numbers_equal(first, second) if first and second else None


def quick_group(answers: Sequence[str]) -> tuple[list[int], list[int]]:
    """`group_by` what `quick_equiv` can tell."""
    return group_by(answers, quick_equiv)


def specific_first(answer: str) -> tuple[bool, int, str]:
    """A sort key: what says more comes before what may be equal to several that differ.

    50% is equal to 50 and to 0.5, and 5 to 5 cm and to 5 m.
    """
    return "%" in answer or "percent" in answer, -len(answer), answer


def group_by(answers: Sequence[str], equal: Callable[[str, str], bool | None]) -> tuple[list[int], list[int]]:
    """For each answer the index of its group's first, and for each group the index of one that stands for it.

    Equality is not transitive: an answer belongs to the first group whose most specific answer, which stands for it,
    is equal to it. So the groups are the same whatever the answers' order is. An empty answer is equal to none.
    """
    texts = [answer.strip() for answer in answers]
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text:
            first.setdefault(text, index)
    standing: list[str] = []
    chosen: dict[str, str] = {}
    for text in sorted(first, key=specific_first):
        chosen[text] = next((other for other in standing if equal(other, text)), text)
        if chosen[text] == text:
            standing.append(text)
    firsts: dict[str, int] = {}
    found = [firsts.setdefault(chosen[text], index) if text else index for index, text in enumerate(texts)]
    return found, [first[text] for text in standing]
