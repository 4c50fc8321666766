"""The search rules by the name that `search.rule` gives them."""

from __future__ import annotations

from collections.abc import Callable

from evolve.schema import Rule, ValueKind
from evolve.search.puct import PUCT
from evolve.search.rule import TreePolicy
from evolve.search.uct import UCT
from evolve.types import RoundPlan

RULES: dict[Rule, Callable[[int, float, bool, int | None], TreePolicy]] = {Rule.uct: UCT, Rule.puct: PUCT}


def rule_of(plan: RoundPlan, rollouts: int) -> TreePolicy:
    """The rule of one tree of a round."""
    return RULES[plan.rule](rollouts, plan.exploration, plan.value is ValueKind.ppm, plan.settled)
