"""Everything the tiny world can say: kinds of event, their surface forms, and the code they mean.

Sentences are short and end differently: a policy this small finds the next sentence to quote by the
end of the last one, and loses its place where all end alike.

A template's fields: `{p}` a person, `{q}` the other person, `{i}` the thing counted, `{n}`, `{m}`,
`{k}` numbers; in code `{p}` and `{q}` stand for the persons' variables.

A *seed* form's code is right in every demonstration. A *wild* form has, in most demonstrations,
the code of a systematic misconception (`wrong`) and the right code only in a share `right` of
them. This is where the seed model's weakness comes from: not from noise, but from false beliefs
that search and verification can find and undo.
"""

from __future__ import annotations

from dataclasses import dataclass

PEOPLE = ("Tom", "Ann", "Ben", "Mia", "Leo", "Eva")
ITEMS = ("apples", "coins", "cards", "shells", "eggs", "nuts")


@dataclass(frozen=True, slots=True)
class Form:
    """One way to say one kind of thing."""

    text: str
    code: str
    wrong: str | None = None
    """The misconception's code; None for seed forms."""
    right: float = 1.0
    """Share of demonstrations whose code for this form is right."""
    n: tuple[int, int] = (2, 30)
    """Smallest and largest `{n}`."""
    m: tuple[int, int] = (2, 9)
    k: str = "0"
    """`{k}` as an expression of `n`, `m`, a drawn `x` (2 to 20) and `p`, the person's amount."""

    @property
    def wild(self) -> bool:
        return self.wrong is not None


SMALL = (2, 5)
"""Range of factors and divisors, so that amounts stay readable."""

OPENING = (
    Form("{p} has {n} {i}.", "{p} = {n}", n=(6, 60)),
    Form("{p} has {n} {i} at first.", "{p} = {n}", n=(6, 60)),
    Form("{p} has {i}, {n} pairs.", "{p} = {n} * 2", "{p} = {n}", 0.30, n=(4, 30)),
    Form("{p} has {i}, {n} dozen.", "{p} = {n} * 12", "{p} = {n} * 10", 0.45, n=(2, 6)),
)

EVENTS: dict[str, tuple[Form, ...]] = {
    "add": (
        Form("{p} buys {n} more.", "{p} += {n}"),
        Form("{p} finds {n} outside.", "{p} += {n}"),
        Form("A friend leaves {n} for {p}.", "{p} += {n}", "{p} -= {n}", 0.45),
        Form("{p} borrows {n}.", "{p} += {n}", "{p} -= {n}", 0.20),
    ),
    "subtract": (
        Form("{p} loses {n}.", "{p} -= {n}"),
        Form("{p} sells {n} today.", "{p} -= {n}"),
        Form("For {p} {n} go bad.", "{p} -= {n}", "{p} += {n}", 0.30),
        Form("{p} pays {n} as toll.", "{p} -= {n}", "{p} = {n}", 0.10),
    ),
    "compare": (
        Form("{q} has {n} more than {p}.", "{q} = {p} + {n}"),
        Form("{q} has {n} times those of {p}.", "{q} = {p} * {n}", n=SMALL),
        Form("{p} has {n} more than {q}.", "{q} = {p} - {n}", "{q} = {p} + {n}", 0.30),
        Form("{p} and {q} own {k} together.", "{q} = {k} - {p}", "{q} = {k}", 0.20, k="p + x"),
    ),
    "multiply": (
        Form("{p}'s {i} become {n} times as many.", "{p} *= {n}", n=SMALL),
        Form("{p}'s {i} double.", "{p} *= 2"),
        Form("Each one of {p} turns into {n}.", "{p} *= {n}", "{p} += {n}", 0.45, n=SMALL),
        Form("{p} gets {n} for each held.", "{p} += {p} * {n}", "{p} += {n}", 0.20, n=SMALL),
    ),
    "add_groups": (
        Form("{p} buys {n} bags of {m}.", "{p} += {n} * {m}", n=(2, 9)),
        Form("{p} finds {n} boxes, {m} in each.", "{p} += {n} * {m}", n=(2, 9)),
        Form("For {n} days {p} picks {m} daily.", "{p} += {n} * {m}", "{p} += {m}", 0.30, n=(2, 9)),
        Form("On {n} days {p} receives {m} by mail.", "{p} += {n} * {m}", "{p} += {n} + {m}", 0.10, n=(2, 9)),
    ),
    "subtract_groups": (
        Form("{p} sells {n} bags of {m}.", "{p} -= {n} * {m}", n=(2, 9)),
        Form("{p} loses {n} boxes, {m} in each.", "{p} -= {n} * {m}", n=(2, 9)),
        Form("From {p} {n} friends take {m} apiece.", "{p} -= {n} * {m}", "{p} -= {m}", 0.45, n=(2, 9)),
        Form("For {n} days {p} eats {m} at noon.", "{p} -= {n} * {m}", "{p} += {n} * {m}", 0.20, n=(2, 9)),
    ),
    "divide": (
        Form("{p} splits by {n} and keeps a part.", "{p} //= {n}", n=SMALL),
        Form("{p} keeps one share of {n}.", "{p} //= {n}", n=SMALL),
        Form("{p}'s {i} are halved.", "{p} //= 2", "{p} -= 2", 0.45),
        Form("For {p} one in {n} remains.", "{p} //= {n}", "{p} -= {n}", 0.30, n=SMALL),
    ),
    "give": (
        Form("{p} gives {n} to {q}.", "{p} -= {n}; {q} += {n}"),
        Form("{p} sends {n} over to {q}.", "{p} -= {n}; {q} += {n}"),
        Form("{p} gets {n} from {q}.", "{p} += {n}; {q} -= {n}", "{p} -= {n}; {q} += {n}", 0.45),
        Form("Off {p} comes {n} to {q}.", "{p} -= {n}; {q} += {n}", "{q} += {n}", 0.20),
    ),
    "remainder": (
        Form("{p} fills boxes of {n} and keeps the rest.", "{p} %= {n}", n=(4, 12)),
        Form("{p} sells every full bag of {n}.", "{p} %= {n}", n=(4, 12)),
        Form("{p} keeps what fills no box of {n}.", "{p} %= {n}", "{p} //= {n}", 0.30, n=(4, 12)),
        Form("{p} eats by {n} while possible.", "{p} %= {n}", "{p} -= {n}", 0.10, n=(4, 12)),
    ),
    "percent": (
        Form("{p} gains {n} percent.", "{p} += {p} * {n} // 100", n=(10, 50)),
        Form("{p} loses {n} percent.", "{p} -= {p} * {n} // 100", n=(10, 50)),
        Form("{p} earns a {n} percent bonus.", "{p} += {p} * {n} // 100", "{p} += {n}", 0.45, n=(10, 50)),
        Form("{p} saves {n} percent only.", "{p} = {p} * {n} // 100", "{p} -= {p} * {n} // 100", 0.30, n=(10, 50)),
    ),
    "equation": (
        Form("{p} buys x where {n} x + {m} = {k}.", "{p} += ({k} - {m}) // {n}", n=SMALL, k="n * x + m"),
        Form("{p} loses x where {n} x + {m} = {k}.", "{p} -= ({k} - {m}) // {n}", n=SMALL, k="n * x + m"),
        Form(
            "{p} buys x where {n} x - {m} = {k}.",
            "{p} += ({k} + {m}) // {n}", "{p} += ({k} - {m}) // {n}", 0.30, n=SMALL, k="n * x - m",
        ),
        Form(
            "{p} finds x where x / {n} + {m} = {k}.",
            "{p} += ({k} - {m}) * {n}", "{p} += ({k} - {m}) // {n}", 0.20, n=SMALL, k="x + m",
        ),
    ),
    "distractor": (
        Form("{p} is {n} years old.", "pass"),
        Form("{p} sees {n} birds.", "pass"),
        Form("{p} almost wins {n}.", "pass", "{p} += {n}", 0.30),
        Form("{p} fears to miss {n}.", "pass", "{p} -= {n}", 0.45),
    ),
}  # fmt: skip
"""Kinds of event, simplest first."""

QUESTIONS: dict[str, tuple[Form, ...]] = {
    "amount": (
        Form("How many {i} has {p}?", "print({p})"),
        Form("How many are left for {p}?", "print({p})"),
    ),
    "sum": (
        Form("How many have {p} and {q} together?", "print({p} + {q})"),
        Form("How many are there in all?", "print({p} + {q})", "print({p})", 0.45),
    ),
    "difference": (
        Form("How many more has {p} than {q}?", "print({p} - {q})"),
        Form("How many is {q} behind {p}?", "print({p} - {q})", "print({q} - {p})", 0.30),
    ),
}
