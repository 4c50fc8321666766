"""Which steps are compared."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.learn.pairs import deduplicate, mine, node_key, normalise
from evolve.learn.split import held_out
from evolve.schema import PPMConfig
from evolve.tree import ROOT, Tree
from evolve.types import NodeKind

STEPS = PPMConfig(trajectory_pairs=False)


class Builder:
    """Grows trees; every `end` is a rollout that is backed up along its path."""

    def __init__(self) -> None:
        self.tree = Tree("p", 2, 1, 0, (100, 101))
        self.token = 0

    def step(self, parent: int, ids: tuple[int, ...] | None = None, inserted: tuple[int, ...] = ()) -> int:
        self.token += 1
        own = ids or (self.token,)
        return self.tree.add(parent, NodeKind.STEP, "", "x = 1", own, (-0.5,) * len(own), inserted_ids=inserted)

    def end(self, parent: int, correct: bool, ids: tuple[int, ...] | None = None, times: int = 1) -> int:
        self.token += 1
        own = ids or (self.token,)
        node = self.tree.add(parent, NodeKind.TERMINAL, "", "", own, (-0.5,) * len(own), answer="1", correct=correct)
        for _ in range(times):
            self.rollout(node, 1.0 if correct else -1.0)
        return node

    def rollout(self, node: int, value: float) -> None:
        while node >= 0:
            self.tree.visits[node] += 1
            self.tree.value_sum[node] += value
            node = self.tree.parent[node]


def test_the_best_siblings_are_paired_with_the_worst_over_their_prefix() -> None:
    b = Builder()
    parent = b.step(ROOT, (7, 8), inserted=(9,))
    b.end(b.step(parent, (1,)), True)
    mixed = b.step(parent, (2,))
    b.end(mixed, True, times=3)
    b.end(mixed, False)
    low = b.step(parent, (3,), inserted=(50,))
    b.end(low, False)
    b.end(b.step(parent, (4,)), False)
    b.end(b.step(parent, (5,)), False)
    pairs = [p for p in mine(b.tree, STEPS) if p.node == parent]
    assert {(p.positive_ids, p.negative_ids) for p in pairs} == {
        ((1,), (3, 50)), ((1,), (4,)), ((2,), (3, 50)), ((2,), (4,)),
    }  # fmt: skip
    assert {p.prefix_ids for p in pairs} == {(100, 101, 7, 8, 9)}
    assert next(p.negative_sampled for p in pairs if p.negative_ids == (3, 50)) == (True, False)
    assert all(p.positive_q > p.negative_q and p.negative_q <= 0 for p in pairs)
    assert (pairs[0].problem_id, pairs[0].round, pairs[0].tree, pairs[0].kind) == ("p", 2, 1, "step")


def test_mining_goes_on_below_a_node_without_a_pair() -> None:
    b = Builder()
    only = b.step(ROOT)
    deeper = b.step(only)
    b.end(deeper, True)
    b.end(deeper, False)
    pairs = mine(b.tree, STEPS)
    assert [p.node for p in pairs] == [deeper]


def test_a_negative_above_the_threshold_is_no_negative() -> None:
    b = Builder()
    b.end(b.step(ROOT), True)
    mixed = b.step(ROOT)
    b.end(mixed, True)
    b.end(mixed, False, times=2)
    assert [p.negative_q for p in mine(b.tree, STEPS) if p.node == ROOT] == [pytest.approx(-1 / 3)]
    strict = PPMConfig(trajectory_pairs=False, negative_q=-0.5)
    assert [p for p in mine(b.tree, strict) if p.node == ROOT] == []


def test_a_step_that_leads_both_ways_is_never_paired_with_itself_or_an_equal() -> None:
    b = Builder()
    for _ in range(2):
        mixed = b.step(ROOT)
        b.end(mixed, True)
        b.end(mixed, False)
    assert [p for p in mine(b.tree, STEPS) if p.node == ROOT] == []


def test_unvisited_and_dead_steps_are_not_compared() -> None:
    b = Builder()
    b.end(b.step(ROOT), True)
    dead = b.tree.add(ROOT, NodeKind.DEAD, "", "", (60,), (-1.0,))
    b.rollout(dead, -1.0)
    b.tree.add(b.step(ROOT), NodeKind.TERMINAL, "", "", (61,), (-1.0,), answer="2", correct=False)
    assert mine(b.tree, PPMConfig()) == []


def test_siblings_with_equal_tokens_count_once() -> None:
    b = Builder()
    b.end(b.step(ROOT, (1,)), True)
    for _ in range(3):
        b.end(b.step(ROOT, (2,)), False)
    b.end(b.step(ROOT, (3,)), False)
    assert {p.negative_ids for p in mine(b.tree, STEPS)} == {(2,), (3,)}


def test_a_repeated_best_step_keeps_its_rank() -> None:
    b = Builder()
    b.end(b.step(ROOT, (1,)), True)
    mixed = b.step(ROOT, (2,))
    b.end(mixed, True, times=3)
    b.end(mixed, False)
    b.end(b.step(ROOT, (1,)), True)
    b.end(b.step(ROOT, (3,)), False)
    best_only = PPMConfig(trajectory_pairs=False, positives=1)
    assert [p.positive_ids for p in mine(b.tree, best_only) if p.node == ROOT] == [(1,)]


def test_whole_trajectories_are_paired_from_the_prompt_only_when_asked() -> None:
    b = Builder()
    good, bad = b.step(ROOT), b.step(ROOT)
    ends = [b.end(good, True), b.end(bad, False)]
    whole = [p for p in mine(b.tree, PPMConfig()) if p.kind == "trajectory"]
    assert len(whole) == 1
    assert whole[0].prefix_ids == b.tree.prompt_ids
    assert whole[0].positive_ids == b.tree.continuation_ids(ends[0])
    assert whole[0].negative_ids == b.tree.continuation_ids(ends[1])
    assert whole[0].negative_q == b.tree.trajectory(ends[1]).q
    assert {p.kind for p in mine(b.tree, STEPS)} == {"step"}


def test_a_trajectory_of_one_step_is_not_compared_twice() -> None:
    b = Builder()
    b.end(ROOT, True)
    b.end(ROOT, False)
    assert [p.kind for p in mine(b.tree, PPMConfig())] == ["step"]


def test_pairs_found_in_two_trees_count_once_and_weights_sum_to_one_a_node() -> None:
    b = Builder()
    b.end(b.step(ROOT, (1,)), True)
    b.end(b.step(ROOT, (2,)), False)
    b.end(b.step(ROOT, (3,)), False)
    first = mine(b.tree, STEPS)
    b.tree.number = 7
    both = deduplicate([*first, *mine(b.tree, STEPS)])
    assert both == first
    assert [p.weight for p in first] == [0.5, 0.5]


def test_weights_are_those_after_filtering() -> None:
    b = Builder()
    b.end(b.step(ROOT, (1,)), True)
    b.end(b.step(ROOT, (2,)), False)
    b.end(b.step(ROOT, (3,)), False)
    assert [p.weight for p in normalise(mine(b.tree, STEPS)[:1])] == [1.0]


@given(st.data())
def test_in_any_tree_pairs_are_ordered_distinct_and_weigh_one_a_node(data: st.DataObject) -> None:
    b = Builder()
    nodes = [ROOT]
    for _ in range(data.draw(st.integers(1, 25))):
        parent = data.draw(st.sampled_from(nodes))
        ids = (data.draw(st.integers(1, 4)),)
        if data.draw(st.booleans()):
            nodes.append(b.step(parent, ids))
        else:
            b.end(parent, data.draw(st.booleans()), ids)
    config = PPMConfig(positives=data.draw(st.integers(1, 3)), negatives=data.draw(st.integers(1, 3)))
    pairs = mine(b.tree, config)
    weights: defaultdict = defaultdict(float)
    for pair in pairs:
        assert pair.negative_q < pair.positive_q
        assert pair.negative_q <= config.negative_q
        assert pair.positive_ids != pair.negative_ids
        assert pair.prefix_ids == b.tree.prefix_ids(pair.node)
        assert len(pair.positive_ids) == len(pair.positive_sampled)
        weights[node_key(pair)] += pair.weight
    assert all(total == pytest.approx(1.0) for total in weights.values())
    assert not [k for k, n in Counter((p.prefix_ids, p.positive_ids, p.negative_ids) for p in pairs).items() if n > 1]


def test_validation_is_split_by_problem_and_stays_split() -> None:
    names = [f"problem-{i}" for i in range(4000)]
    held = {n for n in names if held_out(n, 0.05)}
    assert 130 < len(held) < 270
    assert held == {n for n in names if held_out(n, 0.05)}
    assert held < {n for n in names if held_out(n, 0.2)}, "a larger share only adds"
    assert not any(held_out(n, 0.0) for n in names)
