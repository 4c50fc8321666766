"""Monte Carlo tree search on the digit world."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from doubles import PROBLEM, DigitFormat, DigitVerifier, LengthReward, RandomPolicy

from evolve.search.beam import Beam, chosen
from evolve.search.expand import Expander
from evolve.search.mcts import MCTS
from evolve.search.uct import UCT
from evolve.store.trees import from_table, to_table
from evolve.tree import ROOT, Tree
from evolve.types import (
    Answer,
    Candidate,
    NodeKind,
    Outcome,
    Parsed,
    Problem,
    Sampling,
    ScoreRequest,
    Status,
    Step,
    Verdict,
)


def grown(
    seed: int = 1,
    rollouts: int = 24,
    *,
    policy: RandomPolicy | None = None,
    verifier: DigitVerifier | None = None,
    augmented: bool = False,
    at_once: int = 1,
    max_depth: int = 6,
) -> Tree:
    tree = Tree(PROBLEM.id, 1, 0, seed, (1, 2, 3))
    expander = Expander(
        policy or RandomPolicy(),
        verifier or DigitVerifier(),
        DigitFormat(),
        Sampling(stop=(";",)),
        candidates=4,
        max_depth=max_depth,
        reward=LengthReward() if augmented else None,
    )
    rule = UCT(rollouts=rollouts, augmented=augmented)
    asyncio.run(MCTS(expander, rule, at_once).grow(tree, PROBLEM))
    return tree


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("at_once", [1, 4])
def test_every_rollout_ends_in_a_terminal_or_a_dead_end_and_is_counted_once(augmented: bool, at_once: int) -> None:
    for seed in range(10):
        tree = grown(seed, augmented=augmented, at_once=at_once, policy=RandomPolicy(0.002))
        assert tree.rollouts == tree.visits[0] == 24
        for node in range(len(tree)):
            below = sum(tree.visits[child] for child in tree.children[node])
            if tree.kind[node] in (NodeKind.STEP, NodeKind.ROOT):
                assert tree.visits[node] == below
            assert -1.0 <= tree.q(node) <= 1.0


def test_the_same_seed_gives_the_same_tree_whatever_the_engine_delays() -> None:
    fast, slow = grown(3), grown(3, policy=RandomPolicy(0.003))
    assert to_table([fast]).equals(to_table([slow]))


def test_different_seeds_give_different_trees() -> None:
    assert len({tuple(grown(seed).text) for seed in range(6)}) == 6


def test_a_tree_survives_the_way_through_arrow_unchanged() -> None:
    tree = grown(5, augmented=True)
    [again] = from_table(to_table([tree]))
    assert to_table([again]).equals(to_table([tree]))
    assert again.children == tree.children
    assert again.prompt_ids == tree.prompt_ids


def test_steps_that_fail_are_recorded_but_never_entered() -> None:
    tree = grown(2)
    failed = [node for node in range(len(tree)) if tree.code[node] == "!"]
    assert failed
    assert all(tree.visits[node] == 0 and tree.kind[node] is NodeKind.DEAD for node in failed)


def test_code_continues_from_the_code_of_its_own_ancestors() -> None:
    verifier = DigitVerifier()
    tree = grown(4, verifier=verifier)
    for node in range(1, len(tree)):
        if tree.code[node]:
            assert (tree.prefix_code(tree.parent[node]), tree.code[node]) in verifier.checked


class Answers(RandomPolicy):
    """Ends every solution at its first step, with one of three answers; one is given twice."""

    async def propose(self, prefixes: object, n: int, sampling: Sampling) -> list[list[Candidate]]:
        texts = ["4;", "5;", "4;", "6;"]
        return [[Candidate(text, tuple(map(ord, text)), (-1.0, -1.0)) for text in texts]]


class AnswerFormat(DigitFormat):
    """A digit is an answer in words."""

    def parse(self, text: str, code_ended: bool) -> Parsed:
        return Answer(text, text.removesuffix(";"))


def test_all_distinct_answers_of_a_node_are_kept() -> None:
    tree = Tree(PROBLEM.id, 1, 0, 1, (1, 2, 3))
    expander = Expander(Answers(), DigitVerifier(), AnswerFormat(), Sampling(stop=(";",)), candidates=4, max_depth=6)
    asyncio.run(MCTS(expander, UCT(rollouts=12)).grow(tree, PROBLEM))
    found = [(tree.answer[node], tree.correct[node], tree.copies[node]) for node in tree.children[0]]
    assert found == [("4", True, 2), ("5", False, 1), ("6", False, 1)]
    assert all(tree.visits[node] for node in tree.children[0])


class Chatty(DigitFormat):
    """The environment puts a long text behind the step `+2`."""

    def inserted(self, step: Step, stdout: str) -> str:
        return "x" * 100 if step.code == "+2" else ""


@pytest.mark.parametrize("augmented", [False, True])
def test_a_step_behind_which_no_other_fits_is_dead_and_never_scored(augmented: bool) -> None:
    class Short(LengthReward):
        async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
            assert all(len(r.prompt_ids) + sum(map(len, r.steps)) <= 64 for r in requests)
            return await super().score(requests)

    tree = Tree(PROBLEM.id, 1, 0, 2, (1, 2, 3, 4))
    reward = Short() if augmented else None
    sampling = Sampling(max_tokens=8, stop=(";",))
    expander = Expander(RandomPolicy(), DigitVerifier(), Chatty(), sampling, 4, 6, reward, context=64)
    asyncio.run(MCTS(expander, UCT(rollouts=24, augmented=augmented)).grow(tree, PROBLEM))
    long = [node for node in range(len(tree)) if tree.code[node] == "+2"]
    assert long
    assert {(tree.kind[node], tree.visits[node], tree.status[node].value) for node in long} == {
        (NodeKind.DEAD, 0, "ok")
    }


def test_equal_samples_are_one_child_and_executed_once() -> None:
    verifier = DigitVerifier()
    tree = grown(6, verifier=verifier)
    for children in tree.children:
        texts = [tree.text[child] for child in children]
        assert len(texts) == len(set(texts))
        if children:
            assert sum(tree.copies[child] for child in children) == 4
    assert len(verifier.checked) == sum(map(bool, tree.code))


def test_a_terminal_can_be_visited_again_and_counts_again() -> None:
    tree = grown(1, rollouts=80)
    assert max(tree.visits[node] for node in tree.terminals()) > 1


def test_failures_of_the_sandbox_leave_no_label() -> None:
    trees = [grown(seed, verifier=DigitVerifier(lose=["+2"])) for seed in range(8)]
    lost = [(tree, node) for tree in trees for node in range(len(tree)) if tree.code[node] == "+2"]
    assert len(lost) > 8
    for tree, node in lost:
        assert (tree.kind[node], tree.status[node]) == (NodeKind.LOST, Status.INFRASTRUCTURE)
        assert (tree.visits[node], tree.correct[node]) == (0, None)


def test_a_tree_whose_first_candidates_are_all_lost_ends_and_says_why() -> None:
    tree = grown(2, verifier=DigitVerifier(lose=["+1", "+2", "+3"]))
    assert tree.kind == [NodeKind.ROOT, NodeKind.LOST]
    assert (tree.rollouts, tree.ends, tree.q(ROOT)) == (0, [], 0.0)
    assert "the sandbox is gone" in tree.note


@pytest.mark.parametrize("outcome", [Outcome.TIMEOUT, Outcome.INFRASTRUCTURE])
@pytest.mark.parametrize("at_once", [1, 4])
def test_answers_that_can_never_be_graded_end_the_tree_without_a_label(outcome: Outcome, at_once: int) -> None:
    for seed in range(8):
        policy = Scripted({(): ["+1;", "+2;", "+3;"], ("+1;",): ["=;", "!;"], ("+2;",): ["=;"], ("+3;",): ["!;"]})
        tree = grown(seed, 6, policy=policy, verifier=DigitVerifier(outcome=outcome), at_once=at_once)
        assert list(tree.terminals()) == []
        assert set(tree.ends) == {(tree.text.index("+3;"), -1.0)}
        assert [tree.kind[tree.text.index(text)].value for text in ("+1;", "+2;", "+3;")] == ["lost", "lost", "dead"]
        assert tree.visits[ROOT] == len(tree.ends)
        # A grading that does not end would not end another time, and is the answer's doing.
        assert tree.infrastructure_failures == (4 if outcome is Outcome.INFRASTRUCTURE else 0)
        assert f"grading ended with {outcome}" in tree.note


def test_rollouts_that_end_without_a_value_use_up_the_trees_rollouts() -> None:
    policy = Endless()
    tree = grown(1, 5, policy=policy, verifier=DigitVerifier(outcome=Outcome.TIMEOUT), max_depth=50)
    assert tree.rollouts == 0
    assert policy.calls == 1 + 5


def test_a_candidate_beside_those_that_were_lost_does_not_make_their_node_a_dead_end() -> None:
    policy = Scripted({(): ["+1;", "+3;"], ("+1;",): ["+2;", "bad"], ("+3;",): ["+1;"], ("+3;", "+1;"): ["=;"]})
    tree = grown(1, 6, policy=policy, verifier=DigitVerifier(lose=["+2"]))
    [lost], [right] = ([node for node in tree.children[ROOT] if tree.text[node] == text] for text in ("+1;", "+3;"))
    assert (tree.kind[lost], tree.visits[lost], tree.q(lost)) == (NodeKind.LOST, 0, 0.0)
    assert [tree.kind[child].value for child in tree.children[lost]] == ["lost", "dead"]
    assert tree.q(ROOT) == tree.q(right) == 1.0
    assert tree.rollouts == 5, "one of six was lost"


def test_a_node_whose_last_live_child_dies_beside_a_lost_one_is_lost_and_not_dead() -> None:
    policy = Scripted({(): ["+1;"], ("+1;",): ["+2;", "+3;"], ("+1;", "+3;"): ["bad"]})
    tree = grown(1, 6, policy=policy, verifier=DigitVerifier(lose=["+2"]))
    node, dead = tree.text.index("+1;"), tree.text.index("+3;")
    assert tree.kind[node] is NodeKind.LOST
    assert tree.ends == [(dead, -1.0)], "of the dead one, and none of the node above it"


def test_what_is_lost_once_is_judged_again_and_gives_the_tree_of_an_undisturbed_search() -> None:
    class Hiccup(DigitVerifier):
        hiccups = 1

        async def check(self, problem: Problem, parent: tuple[str, ...], step: str) -> Verdict:
            if self.hiccups:
                self.hiccups -= 1
                return Verdict(Status.INFRASTRUCTURE, message="no memory just now")
            return await super().check(problem, parent, step)

    tree, undisturbed = grown(3, verifier=Hiccup()), grown(3)
    assert tree.infrastructure_failures == 1
    tree.infrastructure_failures, tree.note = 0, ""
    assert to_table([tree]).equals(to_table([undisturbed]))


def test_a_depth_limit_ends_in_a_dead_end_that_lowers_the_tree() -> None:
    tree = grown(1, rollouts=4, max_depth=1)
    assert [tree.kind[node] for node in range(1, len(tree))] == [NodeKind.DEAD]
    assert tree.ends == [(ROOT, -1.0)]
    assert tree.q(ROOT) == -1.0


def test_a_dead_end_two_steps_down_lowers_every_step_to_it_and_not_the_right_one_beside() -> None:
    script = {(): ["+1;", "+3;"], ("+1;",): ["+2;"], ("+1;", "+2;"): ["bad"], ("+3;",): ["+1;"], ("+3;", "+1;"): ["=;"]}
    tree = grown(1, 6, policy=Scripted(script))
    first, below, beside = (tree.text.index(text) for text in ("+1;", "+2;", "+3;"))
    [right] = tree.terminals()
    assert sorted(tree.ends) == [*[(right, 1.0)] * 5, (below, -1.0)]
    assert [tree.q(node) for node in (below, first, beside)] == [-1.0, -1.0, 1.0]
    assert tree.q(ROOT) == pytest.approx((5 - 1) / 6)


class Scripted(RandomPolicy):
    """Continues each solution, given as the texts of its steps, by what is written for it."""

    def __init__(self, script: dict[tuple[str, ...], list[str]]) -> None:
        super().__init__()
        self.script = {"".join(texts): candidates for texts, candidates in script.items()}

    async def propose(self, prefixes: object, n: int, sampling: Sampling) -> list[list[Candidate]]:
        [prefix] = prefixes
        texts = self.script["".join(map(chr, prefix[3:]))]
        return [[Candidate(t, tuple(map(ord, t)), (-0.5,) * len(t), truncated=not t.endswith(";")) for t in texts]]


class Endless(RandomPolicy):
    """Has 50 steps to begin with, each of which may only be followed by the end."""

    async def propose(self, prefixes: object, n: int, sampling: Sampling) -> list[list[Candidate]]:
        self.calls += 1
        [prefix] = prefixes
        texts = [f"+{number};" for number in range(50)] if len(prefix) == 3 else ["=;"]
        return [[Candidate(t, tuple(map(ord, t)), (-0.5,) * len(t)) for t in texts]]


class Silent(RandomPolicy):
    """Has no room for the prompt."""

    async def propose(self, prefixes: object, n: int, sampling: Sampling) -> list[list[Candidate]]:
        return [[]]


def test_a_tree_without_any_candidate_ends_and_says_so() -> None:
    tree = grown(policy=Silent())
    assert tree.note
    assert len(tree) == 1


def test_siblings_are_scored_in_one_batch() -> None:
    reward = LengthReward()
    tree = Tree(PROBLEM.id, 1, 0, 1, (1, 2, 3))
    expander = Expander(RandomPolicy(), DigitVerifier(), DigitFormat(), Sampling(), 8, 6, reward)
    asyncio.run(MCTS(expander, UCT(rollouts=10, augmented=True)).grow(tree, PROBLEM))
    expanded = sum(
        any((tree.status[c].value == "ok" and tree.kind[c] is not NodeKind.DEAD) or tree.visits[c] for c in children)
        for children in tree.children
    )
    assert len(reward.batches) <= sum(map(tree.is_expanded, range(len(tree))))
    assert len(reward.batches) >= expanded


def test_beam_search_attaches_children_to_their_own_parents_once_a_solution_is_finished() -> None:
    for seed in range(20):
        tree = Tree(PROBLEM.id, 1, 0, seed, (1, 2, 3))
        verifier = DigitVerifier()
        expander = Expander(RandomPolicy(), verifier, DigitFormat(), Sampling(), 6, 6, LengthReward())
        asyncio.run(Beam(expander, width=3).grow(tree, PROBLEM))
        for node in tree.terminals():
            assert tree.answer[node] == str(sum(int(code) for code in tree.prefix_code(tree.parent[node])))
        found = chosen(tree)
        assert found is None or tree.kind[found] is NodeKind.TERMINAL


def test_beam_search_without_a_ppm_is_refused() -> None:
    expander = Expander(RandomPolicy(), DigitVerifier(), DigitFormat(), Sampling(), 6, 6)
    with pytest.raises(ValueError, match="PPM"):
        asyncio.run(Beam(expander, 2).grow(Tree("p", 1, 0, 0, (1,)), PROBLEM))
