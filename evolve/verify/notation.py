r"""The normal form of an answer's notation: what encloses it, LaTeX spellings, and a trailing unit taken off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from evolve.verify.printed import from_printed
from evolve.verify.units import MONEY, take_unit

_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(?P<brace>\{)|(?P<bare>[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?|[A-Za-z](?![A-Za-z])))"
    r"|\\.|[{}]",
    re.DOTALL,
)
r"""A box's opening, or one without braces (a number or a letter); else an escaped character or a brace."""


def _boxes(text: str) -> Iterator[tuple[int, int, int, int]]:
    """The complete boxes of a text: where each begins, where its contents do, where those end, where it ends."""
    open_braces: list[tuple[int, int] | None] = []
    for match in _BOX.finditer(text):
        if match["bare"]:
            yield match.start(), match.start("bare"), match.end(), match.end()
        elif match["brace"]:
            open_braces.append((match.start(), match.end()))
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                yield *box, match.start(), match.end()


def extract_answer(text: str) -> str | None:
    r"""The contents of the complete `\boxed{...}` of `text` that begins last; None when there is none."""
    last = max(_boxes(text), default=None)
    return None if last is None else text[last[1] : last[2]].strip()


WORDS = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|rm|bf)\s*\{([^{}]*)\}"
_SPACES = re.compile(r"(?<!\\)\\[!,;: >]|\\quad|\\qquad|~|\u00a0|\u202f")
_ANGLE_BRACKETS = re.compile(r"\\langle(?![a-zA-Z])(.*?)\\rangle(?![a-zA-Z])|^<([^<>]*,[^<>]*)>$")
_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_FENCES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|mathstrut)(?![a-zA-Z])\s*")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\degrees?(?![a-zA-Z])")
_TEMPERATURE = re.compile(
    rf"\s*(?:{_DEGREES.pattern})\s*(?:(?:\\(?:text|mbox|mathrm|rm)\s*\{{)?\s*([CF])(?:elsius|ahrenheit)?\s*\}}?)?$"
)
"""A degree sign at the end, and of which scale."""
_ANGLE = re.compile(rf"(\d+(?:\.\d+)?)\s*(?:{_DEGREES.pattern})")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])(?!\s*\^\s*\{?\s*-)")


def _unwrap(text: str) -> str:
    """Strip what encloses a whole answer: white space, dollars, display brackets, a full stop."""
    while True:
        before = text
        text = text.strip()
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = text[len(left) : len(text) - len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                if left not in inner:
                    text = inner
                break
        if text.startswith(("\\boxed", "\\fbox")):
            whole = (text[box[1] : box[2]] for box in _boxes(text) if box[0] == 0 and box[3] == len(text))
            text = next(whole, text)
        if len(text) > 1 and text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        if text == before:
            return text


@lru_cache(maxsize=1 << 12)
def normalise(text: str) -> tuple[str, str]:
    """An answer's normal form, and the unit that was taken off it (canonical; empty: none, or unknown)."""
    text = _unwrap(text.replace("\n", " "))
    text = text.replace("−", "-").replace("–", "-").replace("π", "\\pi ").replace("∞", "\\infty ")
    text = text.replace("∪", "\\cup ").replace("±", "\\pm ").replace("×", "\\times ").replace("·", "\\cdot ")
    text = re.sub(r"√\s*(\d+|\([^()]*\))", lambda m: "\\sqrt{" + m[1].strip("()") + "}", text)
    text = re.sub(r"\s*,\s*\\!\s*", ",", text)
    text = _SPACES.sub(" ", text)
    text = _FENCES.sub("", text)
    text = _ANGLE_BRACKETS.sub(lambda m: f"({m[1] or m[2]})", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = _FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"_\{\s*(\d+)\s*\}|(?<=\\log)_(\d)|_(\d+)", lambda m: f"_{{{m[1] or m[2] or m[3]}}}", text)
    text = re.sub(r"\\(?:ge|geqslant)(?![a-zA-Z])", r"\\geq", re.sub(r"\\(?:le|leqslant)(?![a-zA-Z])", r"\\leq", text))
    text = text.replace("\\varnothing", "\\emptyset").replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    text, scale = _take_degrees(text)
    money = re.match(r"[+-]?\s*\\?([$€£])\s*[\d.]", text)
    text = re.sub(r"\\?\$|[€£]", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    text, unit = take_unit(text)
    unit = unit or scale
    if money:
        unit = MONEY[money[1]] + (unit if unit.startswith("/") else "")
    text = re.sub(r"^([+-]) (?=\d)", r"\1", text)
    return from_printed(text), unit


def _take_degrees(text: str) -> tuple[str, str]:
    """Take degree signs off: angles of sines and the like become radians; the unit of one at the end."""
    sine = _TRIGONOMETRIC.search(text)
    if sine:
        text = text[: sine.end()] + _ANGLE.sub(r"{\\frac{\1\\pi}{180}}", text[sine.end() :])
    end = _TEMPERATURE.search(text)
    unit = "" if end is None else {"C": "celsius", "F": "fahrenheit", None: "degree"}[end[1]]
    return _DEGREES.sub("", text[: end.start()] if end else text), unit
