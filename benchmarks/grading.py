"""Whether graded answers are told right from wrong: `python -m benchmarks.grading FILE... [--answer COLUMN]`.

Every gold answer of the JSON-lines files must equal itself and obvious rewritings of it, and no near-miss, both ways
round; 64 answers must be grouped for a vote quickly. What went wrong is printed.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from benchmarks.common import Goal, finish, parser
from evolve.verify.grading import equiv, group

_PLAIN = r"-?\d+|-?\\d?frac\{\d+\}\{\d+\}|-?\d*\\sqrt\{\d+\}"


def rewritings(gold: str) -> Iterator[str]:
    """Obvious other ways to write an answer."""
    yield gold
    yield f"  {gold} "
    yield f"${gold}$"
    yield f"\\boxed{{{gold}}}"
    yield gold.replace("\\dfrac", "\\frac")
    yield re.sub(r"\\d?frac", r"\\dfrac", gold)
    yield re.sub(r"\\d?frac", r"\\tfrac", gold)
    worded = "\\text" in gold or "\\mbox" in gold
    if not worded:
        yield re.sub(r"(?<=[\w})])\s*([-+=,])\s*(?=[\w\\({])", r" \1 ", gold) if not _thousands(gold) else gold
        yield re.sub(r"(?<![A-Za-z\\]) +| +(?![A-Za-z])", "", gold) if not re.search(r"\d +\d", gold) else gold
        yield re.sub(r"(?<!begin)(?<!end)\{", "{ ", gold.replace(", ", ",\\ "))
    if "=" not in gold and "\\in" not in gold:
        yield f"x={gold}"
        yield f"x = {gold}"
        yield f"$x = {gold}$"
    if re.search(r"\d", gold) and not worded:
        yield f"{gold} \\text{{ units}}"
        if not re.search(r"\\circ|%|\$", gold):
            yield f"{gold}\\text{{ cm}}"
    yield from _as_python(gold)
    if re.fullmatch(_PLAIN, gold):
        yield f"{gold} units"
        yield f"{gold} dollars"
        yield f"{gold}."
    if re.fullmatch(r"-?\d+", gold):
        yield f"{gold}.0"
        yield f"{int(gold):,}"
        yield f"\\${gold}" if not gold.startswith("-") else gold
    if "\\left" not in gold:
        yield gold.replace("(", "\\left(").replace(")", "\\right)") if gold.count("(") == gold.count(")") else gold


def _as_python(gold: str) -> Iterator[str]:
    """What Python prints for an answer."""
    fraction = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold)
    if fraction:
        yield f"Fraction({fraction[1]}{fraction[2]}, {fraction[3]})"
    if re.fullmatch(r"-?\d+(?:\.\d+)?", gold):
        yield f"np.float64({gold})"
        yield f"{Decimal(gold):e}"
        yield f"Eq(x, {gold})"
        yield f"{Decimal(gold):e}".replace("e", "\\times10^{") + "}"
    numbers = re.fullmatch(r"\((-?\d+), ?(-?\d+)\)", gold)
    if numbers:
        yield f"y={numbers[2]}, x={numbers[1]}"
        yield f"(x, y) = ({numbers[1]}, {numbers[2]})"
        yield f"\\langle {numbers[1]}, {numbers[2]} \\rangle"
    if re.fullmatch(r"[-+ \da-z^=]*", gold) and re.search(r"[a-z]", gold) and not re.search(r"[a-z]{2}|\d\d", gold):
        yield re.sub(r"(?<=\d)(?=[a-z])", "*", gold).replace("^", "**")


def _thousands(text: str) -> bool:
    return re.search(r"\d,\d{3}|\\!", text) is not None


def near_misses(gold: str) -> Iterator[str]:
    """Answers that look alike and are wrong."""
    for number in re.finditer(r"\d+", gold):
        before, after = gold[: number.start()], gold[number.end() :]
        if not (_thousands(gold) or before.endswith(".") or after.startswith(".") or re.search(r"mbox|text", before)):
            yield f"{before}{int(number[0]) + 1}{after}"
            if int(number[0]) > 1:
                yield f"{before}{int(number[0]) - 1}{after}"
    if gold.startswith("-"):
        yield gold[1:]
    elif re.fullmatch(_PLAIN, gold) and not re.fullmatch("0+", gold):
        yield "-" + gold
    fraction = re.fullmatch(r"(-?)(\\d?frac)\{(\d+)\}\{(\d+)\}", gold)
    if fraction and fraction[3] != fraction[4]:
        yield f"{fraction[1]}{fraction[2]}{{{fraction[4]}}}{{{fraction[3]}}}"
    if re.search(r"(?<=[\w})]) ?\+ ?(?=[\w\\])", gold) and "=" not in gold:
        yield re.sub(r"(?<=[\w})])( ?)\+( ?)(?=[\w\\])", r"\1-\2", gold, count=1)
    if re.fullmatch(r"[(\[][^()\[\]{}]*,[^()\[\]{}]*[)\]]", gold) and gold[0] + gold[-1] != "()":
        yield ("(" if gold[0] == "[" else "[") + gold[1:]
        yield gold[:-1] + (")" if gold[-1] == "]" else "]")
    if re.search(r"[1-9]\d*[})]*$", gold) and not re.search("mbox|text|_", gold):
        for letters in ("t", "h", " ab", " xy"):
            yield gold + letters
    if re.fullmatch(_PLAIN, gold) and re.search("[1-9]", gold):
        for word in ("million", "dozen", "dozens", "thousands", "\\mod 5", "squared", "thirds", "PM", "or three"):
            yield f"{gold} {word}"
            if "\\" not in word:
                yield f"{gold}\\text{{ {word}}}"
    tuple_ = re.fullmatch(r"(\\left)?\((.*?)(\\right)?\)", gold)
    parts = [part.strip() for part in tuple_[2].split(",")] if tuple_ else []
    if len(parts) > 1 and parts[0] != parts[1] and all(p.count("(") == p.count(")") for p in parts):
        yield f"({', '.join([parts[1], parts[0], *parts[2:]])})"
        if len(parts) < 4 and not re.search(r"=|\(", ",".join(parts)):
            named = zip("xyz", [parts[1], parts[0], *parts[2:]], strict=False)
            yield ", ".join(f"{name}={part}" for name, part in named)
            yield f"({','.join('yxz'[: len(parts)])}) = ({', '.join(parts)})"


def read(path: Path, column: str) -> list[str]:
    """The distinct gold answers of a JSON-lines file."""
    rows = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return list(dict.fromkeys(str(row[column]) for row in rows))


def sweep(golds: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Compare each gold answer with its rewritings and near-misses, both ways round: counts, and what went wrong."""
    counts = {"golds": len(golds), "rewritings": 0, "near_misses": 0, "unequal_rewritings": 0, "equal_near_misses": 0}
    counts["asymmetric"] = 0
    wrong = []
    for gold in golds:
        for kind, made, wanted in (("rewritings", rewritings, True), ("near_misses", near_misses, False)):
            for other in dict.fromkeys(made(gold)):
                there, back = equiv(gold, other), equiv(other, gold)
                counts[kind] += 1
                counts["asymmetric"] += there != back
                if not (there is back is wanted):
                    counts["unequal_rewritings" if wanted else "equal_near_misses"] += 1
                    wrong.append(f"{'unequal' if wanted else 'equal'}: {gold!r} and {other!r} ({there}, {back})")
    return counts, wrong


def grouping_s(golds: Sequence[str], repeats: int) -> tuple[float, float]:
    """CPU seconds to group 64 answers, drawn from a dozen golds and their rewritings: the median and the slowest."""
    rng = random.Random(0)
    times = []
    for _ in range(repeats):
        chosen = rng.sample(list(golds), min(12, len(golds)))
        answers = [rng.choice(list(rewritings(rng.choice(chosen)))) for _ in range(64)]
        began = time.process_time()
        group(answers)
        times.append(time.process_time() - began)
    return sorted(times)[repeats // 2], max(times)


GOALS = (
    Goal("unequal_rewritings", "at most", 0),
    Goal("equal_near_misses", "at most", 0),
    Goal("asymmetric", "at most", 0),
    Goal("group_64_slowest_s", "at most", 2.0),
)


def main() -> int:
    made = parser("grading", __doc__)
    made.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines with gold answers")
    made.add_argument("--answer", default="answer", metavar="COLUMN", help="the column of the answers")
    arguments = made.parse_args()
    golds = list(dict.fromkeys(gold for path in arguments.files for gold in read(path, arguments.answer)))
    began = time.process_time()
    counts, wrong = sweep(golds)
    record: dict[str, Any] = {**counts, "seconds": time.process_time() - began}
    record["group_64_s"], record["group_64_slowest_s"] = grouping_s(golds, 40)
    for line in wrong:
        print(line)
    return finish(record, GOALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
