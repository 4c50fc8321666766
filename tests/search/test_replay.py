"""The event log: a tree can be grown again from it, and every invariant of a search holds for grown trees."""

import asyncio
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from doubles import PROBLEM, DigitFormat, DigitVerifier, LengthReward, RandomPolicy

from evolve.search.expand import Expander
from evolve.search.mcts import MCTS
from evolve.search.puct import PUCT
from evolve.search.replay import Backup, Expansion, events, replay
from evolve.search.rule import MeanValue
from evolve.search.uct import UCT
from evolve.store.trees import from_table, to_table
from evolve.tree import ROOT, Tree
from evolve.types import NodeKind, Problem, Sampling

RULES = {"uct": UCT, "puct": PUCT}

searches = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "rollouts": st.integers(1, 20),
        "rule": st.sampled_from(sorted(RULES)),
        "augmented": st.booleans(),
        "at_once": st.integers(1, 4),
        "max_depth": st.integers(1, 6),
        "lose": st.sampled_from([(), ("+2",), ("+2", "="), ("+2", "+3", "=")]),
    }
)


def grown(
    seed: int, rollouts: int, rule: str, augmented: bool, at_once: int, max_depth: int, lose: tuple[str, ...] = ()
) -> tuple[Tree, MeanValue]:
    tree = Tree(PROBLEM.id, 1, 0, seed, (1, 2, 3))
    reward = LengthReward() if augmented else None
    policy = RandomPolicy(0.001 if at_once > 1 else 0.0)
    expander = Expander(policy, DigitVerifier(lose), DigitFormat(), Sampling(), 4, max_depth, reward)
    chosen = RULES[rule](rollouts=rollouts, augmented=augmented)
    asyncio.run(MCTS(expander, chosen, at_once).grow(tree, PROBLEM))
    return tree, chosen


@settings(max_examples=60, deadline=None)
@given(search=searches)
def test_replaying_the_event_log_gives_the_same_tree(search: dict) -> None:
    tree, rule = grown(**search)
    again = replay(tree, rule)
    for name in ("parent", "children", "text", "kind", "visits", "value_sum", "prior", "expanded_at", "ends"):
        assert getattr(again, name) == getattr(tree, name), name
    assert again.rollouts == tree.rollouts


@settings(max_examples=60, deadline=None)
@given(search=searches)
def test_visits_of_children_sum_up_and_q_stays_in_range(search: dict) -> None:
    tree, _ = grown(**search)
    assert tree.rollouts == tree.visits[ROOT] == len(tree.ends)
    for node in range(len(tree)):
        ended = sum(end == node for end, _ in tree.ends)
        assert tree.visits[node] == ended + sum(tree.visits[child] for child in tree.children[node])
        assert -1.0 <= tree.q(node) <= 1.0


@settings(max_examples=30, deadline=None)
@given(search=searches)
def test_the_same_seed_gives_the_same_tree(search: dict) -> None:
    search = {**search, "at_once": 1}
    (one, _), (two, _) = grown(**search), grown(**search)
    assert to_table([one]).equals(to_table([two]))


@settings(max_examples=30, deadline=None)
@given(search=searches)
def test_the_log_survives_the_way_through_arrow(search: dict) -> None:
    tree, _ = grown(**search)
    [again] = from_table(to_table([tree]))
    assert list(events(again)) == list(events(tree))


def test_part_of_the_log_gives_the_tree_as_it_was_then() -> None:
    early, rule = grown(3, 5, "uct", False, 1, 6)
    late, _ = grown(3, 15, "uct", False, 1, 6)
    log = []
    for event in events(late):
        log.append(event)
        if sum(isinstance(e, Backup) for e in log) == 5:
            break
    then = replay(late, rule, log)
    assert then.visits == early.visits
    assert then.value_sum == early.value_sum
    assert then.kind == early.kind


def test_every_selected_node_was_made_by_an_expansion_before() -> None:
    tree, _ = grown(7, 15, "uct", True, 3, 6)
    made = {ROOT}
    for event in events(tree):
        if isinstance(event, Expansion):
            assert event.node in made
            made |= set(event.children)
        else:
            assert set(event.path) <= made
    assert made == set(range(len(tree)))


def test_the_log_of_another_tree_is_refused() -> None:
    tree, rule = grown(3, 5, "uct", False, 1, 6)
    with pytest.raises(ValueError, match="where it is not"):
        replay(tree, rule, [Backup((0, 1), 1.0)])
    first = next(iter(events(tree)))
    with pytest.raises(ValueError, match="expanded already"):
        replay(tree, rule, [first, first])


def test_a_settled_tree_stops_once_both_outcomes_were_seen_often_enough() -> None:
    problem = Problem("digits-low", "sum to at most three", ("1", "2", "3"))
    for seed in range(8):
        tree = Tree(problem.id, 1, 0, seed, (1, 2, 3))
        expander = Expander(RandomPolicy(), DigitVerifier(), DigitFormat(), Sampling(), 4, 6)
        asyncio.run(MCTS(expander, UCT(rollouts=200, settled=1)).grow(tree, problem))
        reached = {bool(tree.correct[node]) for node in tree.terminals() if tree.visits[node]}
        assert (reached == {True, False}) == (tree.rollouts < 200)
        if tree.rollouts < 200:
            end, _ = tree.ends[-1]
            assert tree.kind[end] is NodeKind.TERMINAL
            assert tree.visits[end] == 1, "the rollout that settled it was the last"
            return
    pytest.fail("no seed settled: the test shows nothing")


def test_rollouts_in_flight_can_be_raised_while_a_tree_grows() -> None:
    tree = Tree(PROBLEM.id, 1, 0, 1, (1, 2, 3))
    policy = RandomPolicy(0.01)
    mcts = MCTS(Expander(policy, DigitVerifier(), DigitFormat(), Sampling(), 4, 6), UCT(rollouts=40))
    in_flight = most = 0
    propose = policy.propose

    async def counted(*arguments: object) -> list:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        try:
            return await propose(*arguments)
        finally:
            in_flight -= 1

    policy.propose = counted

    async def run() -> None:
        growing = asyncio.ensure_future(mcts.grow(tree, PROBLEM))
        while tree.rollouts < 5:  # noqa: ASYNC110 (nothing tells of a rollout)
            await asyncio.sleep(0.001)
        assert most == 1
        mcts.concurrent_rollouts = 4
        await asyncio.wait_for(growing, 30)

    asyncio.run(run())
    assert most > 1
    assert tree.rollouts == 40
