from __future__ import annotations


def quick_equiv(a: str, b: str) -> bool | None:
    a, b = a.strip(), b.strip()
    if a == b:
        return True
    return None


def equiv(a: str, b: str) -> bool:
    from math_verify import parse, verify

    pa, pb = parse(f"${a}$", parsing_timeout=None), parse(f"${b}$", parsing_timeout=None)
    return bool(verify(pa, pb, timeout_seconds=None) or verify(pb, pa, timeout_seconds=None))


def group(answers: list[str]) -> list[int]:
    raise NotImplementedError


def warm_up() -> None:
    equiv("1", "2")
    equiv("\\frac{1}{2}", "0.5")
