"""The board: budgets, escalation, and what happens to trees that are given back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evolve.schema import Generator, ValueKind
from evolve.search.board import Board, statistics
from evolve.search.budget import EscalatingBudget, Standing, TreeSummary, TreeTask, difficulty_class, fair_share
from evolve.search.grown import Earlier, Summaries
from evolve.search.shard import summary_of
from evolve.store.trees import Part, TreeKey, to_batch, write_part
from evolve.tree import Tree
from evolve.types import NodeKind, Problem, RoundPlan, Status

PROBLEMS = [Problem(f"p{number}", "?", ("1",), difficulty=number % 2) for number in range(4)]


def plan(trees: int = 1, retry_trees: int = 1, escalation: tuple[int, ...] = ()) -> RoundPlan:
    return RoundPlan(4, Generator.previous, ValueKind.terminal, 16, 8, 2.0, trees, retry_trees, escalation)


def summary(problem: str, number: int, correct: int = 0, wrong: int = 1) -> TreeSummary:
    return TreeSummary(problem, number, 5, correct, wrong, 16, 100, 0, 4, 0)


def board(tmp_path: Path, budget: RoundPlan, finished: tuple[TreeSummary, ...] = (), **options: Any) -> Board:
    known = [(summary, "part-old.parquet") for summary in finished]
    return Board(EscalatingBudget(budget), PROBLEMS, known, tmp_path, **options)


def trees(count: int) -> list[tuple[str, int]]:
    return [(problem.id, number) for problem in PROBLEMS for number in range(count)]


def keys(tasks: list[TreeTask] | None) -> list[tuple[str, int]]:
    return [(task.problem.id, task.number) for task in tasks or []]


def drain(some: Board, solve: dict[str, int]) -> list[tuple[str, int, int]]:
    """Grow everything; a problem is solved by the tree whose number `solve` names."""
    grown = []
    while (tasks := some.take("s", 3)) is not None:
        for task in tasks:
            grown.append((task.problem.id, task.number, task.rollouts))
            correct = int(solve.get(task.problem.id) == task.number)
            some.publish("s", [(summary(task.problem.id, task.number, correct), [None])])
    return grown


def test_a_problem_unsolved_gets_another_tree_and_a_solved_one_does_not(tmp_path: Path) -> None:
    grown = drain(board(tmp_path, plan()), {"p0": 0, "p1": 1})
    assert sorted(grown) == [
        ("p0", 0, 16),
        ("p1", 0, 16),
        ("p1", 1, 16),
        *((p, n, 16) for p in ("p2", "p3") for n in (0, 1)),
    ]


def test_escalation_gives_more_rollouts_to_what_is_still_unsolved(tmp_path: Path) -> None:
    grown = drain(board(tmp_path, plan(trees=2, retry_trees=0, escalation=(64, 128))), {"p0": 1, "p1": 2})
    by_problem = {p: [r for q, _, r in sorted(grown) if q == p] for p in ("p0", "p1", "p2")}
    assert by_problem == {"p0": [16, 16], "p1": [16, 16, 64], "p2": [16, 16, 64, 128]}


def test_trees_that_are_durable_already_are_not_grown_again(tmp_path: Path) -> None:
    done = (summary("p0", 0, correct=1), summary("p1", 0), summary("p1", 1))
    grown = drain(board(tmp_path, plan(), done), {})
    assert {(p, n) for p, n, _ in grown} == {(p, n) for p in ("p2", "p3") for n in (0, 1)}


@pytest.mark.parametrize(
    ("done", "correct", "expected"),
    [
        ((0, 1, 3), 0, [(2, 64)]),
        ((0, 1, 3), 1, [(2, 64)]),
        ((1, 3), 0, [(0, 16), (2, 64)]),
        ((3,), 1, [(0, 16), (1, 16), (2, 64)]),
        ((0, 1, 2), 0, [(3, 128)]),
        ((0, 1, 2), 1, []),
        ((0, 1, 2, 3), 0, []),
        ((), 0, [(0, 16), (1, 16)]),
    ],
)
def test_trees_that_were_lost_since_are_due_before_further_ones(
    done: tuple[int, ...], correct: int, expected: list[tuple[int, int]]
) -> None:
    budget = EscalatingBudget(plan(trees=2, retry_trees=0, escalation=(64, 128)))
    due = budget.due(PROBLEMS[0], Standing(done=done, correct=correct))
    assert [(task.number, task.rollouts) for task in due] == expected


def test_a_tree_published_twice_counts_once(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0))
    some.take("s", 4)
    for _ in range(2):
        some.publish("s", [(summary("p0", 0, correct=1), [None])])
    assert some.progress().trees == 1


def test_a_dead_shards_trees_are_grown_by_another(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0))
    first = some.take("dies", 4)
    assert first is not None
    assert some.take("lives", 4) == []
    some.give_back("dies")
    assert some.take("lives", 4) == first


def test_trees_published_by_a_shard_that_died_before_they_were_durable_are_grown_again(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0))
    taken = some.take("dies", 4)
    some.publish("dies", [(summary(p.id, 0, correct=1), [None]) for p in PROBLEMS])
    some.durable(Part("part-a.parquet", (TreeKey("p0", 0),)))
    assert some.progress().solved == 4
    some.give_back("dies")
    progress = some.progress()
    assert (progress.solved, progress.trees, progress.rollouts, progress.done) == (1, 1, 16, False)
    again = some.take("lives", 4)
    assert sorted(keys(again)) == sorted(key for key in keys(taken) if key != ("p0", 0))


def test_a_tree_finished_by_a_shard_thought_dead_is_not_grown_a_second_time(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0))
    some.take("slow", 4)
    some.give_back("slow")
    some.publish("slow", [(summary(p.id, 0, correct=1), [None]) for p in PROBLEMS])
    assert some.take("other", 4) is None
    assert some.progress().settled == 4


def test_a_problem_that_a_shard_thought_dead_did_not_solve_keeps_its_retries(tmp_path: Path) -> None:
    some = board(tmp_path, plan())
    some.take("slow", 4)
    some.give_back("slow")
    some.publish("slow", [(summary(p.id, 0, correct=p.id == "p0"), [None]) for p in PROBLEMS])
    assert sorted(keys(some.take("other", 4))) == [("p1", 1), ("p2", 1), ("p3", 1)]


def test_a_tree_that_two_shards_made_durable_is_in_one_place(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0))
    some.take("slow", 4)
    some.give_back("slow")
    some.take("other", 4)
    for shard in ("slow", "other"):
        some.publish(shard, [(summary("p0", 0, correct=1), [f"the batch of {shard}"])])
    assert some.sources("p0").batches == ("the batch of slow",)
    for shard in ("other", "slow"):
        some.durable(Part(f"part-{shard}.parquet", (TreeKey("p0", 0),)))
    assert (some.sources("p0").batches, some.sources("p0").parts) == ((), (tmp_path / "part-other.parquet",))


def test_the_last_trees_are_shared_out_fairly(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0))
    assert [some.take(shard, 0) for shard in ("a", "b")] == [[], []]
    first, second = some.take("a", 64), some.take("b", 64)
    assert (len(first or []), len(second or [])) == (2, 2)
    assert some.take("a", 64) == []


def test_a_shard_that_joins_has_its_share_and_one_that_is_gone_has_none(tmp_path: Path) -> None:
    some = board(tmp_path, plan(trees=3, retry_trees=0))
    assert len(some.take("first", 4) or []) == 4
    assert len(some.take("joins", 64) or []) == 6, "half of twelve"
    assert len(some.take("first", 64) or []) == 2
    gone = [f"gone-{number}" for number in range(14)]
    assert [some.take(shard, 64) for shard in gone] == [[]] * 14
    for shard in ("joins", *gone):
        some.give_back(shard)
    assert len(some.take("first", 64) or []) == 6, "all that is left"


@pytest.mark.parametrize(
    ("room", "own", "waiting", "in_flight", "shards", "expected"),
    [
        (64, 0, 1000, 0, 2, 64),  # plenty: as many as there is room for
        (64, 0, 10, 0, 2, 5),  # the end: half of what is left
        (54, 10, 10, 14, 2, 2),  # own 10 and 2 more are half of 24
        (54, 10, 4, 10, 2, 0),  # has more than its half already
        (8, 0, 3, 64, 2, 3),  # the other one holds 64 (or died with them): nothing waits for it
        (64, 0, 1, 0, 16, 1),  # a single tree goes to whoever asks
        (0, 5, 9, 5, 1, 0),
    ],
)
def test_a_fair_share_by_hand(room: int, own: int, waiting: int, in_flight: int, shards: int, expected: int) -> None:
    assert fair_share(room, own, waiting, in_flight, shards) == expected


def round_before(directory: Path, tokens: dict[str, int]) -> Earlier:
    """A part for each problem's tree."""
    names = []
    for problem, count in tokens.items():
        tree = small_tree(problem)
        tree.sampled_tokens = count
        names.append(write_part(directory, f"part-{problem}", [to_batch(tree)]).name)
    return Earlier(directory, tuple(names))


def test_the_longest_expected_trees_go_first_and_the_harder_where_nothing_is_known(tmp_path: Path) -> None:
    earlier = round_before(tmp_path, {"p0": 160, "p1": 640, "p2": 1440, "p3": 320, "gone": 9999})
    known = board(tmp_path, plan(), earlier=earlier)
    assert [problem for problem, _ in keys(known.take("s", 4))] == ["p2", "p1", "p3", "p0"]
    assert known.progress().note == ""
    half = board(tmp_path, plan(), earlier=Earlier(tmp_path, earlier.parts[:2]))
    assert [problem for problem, _ in keys(half.take("s", 4))] == ["p1", "p3", "p2", "p0"], "unknown: as the mean"
    unknown = board(tmp_path, plan())
    assert [problem for problem, _ in keys(unknown.take("s", 4))] == ["p1", "p3", "p0", "p2"]


def test_parts_of_the_round_before_that_cannot_be_read_cost_what_they_would_have_told_and_a_note(
    tmp_path: Path,
) -> None:
    earlier = round_before(tmp_path, {"p0": 160, "p1": 640, "p2": 1440, "p3": 320})
    cut, gone = (tmp_path / name for name in earlier.parts[2:])
    cut.write_bytes(cut.read_bytes()[:-20])
    gone.unlink()
    some = board(tmp_path, plan(), earlier=earlier)
    assert [problem for problem, _ in keys(some.take("s", 4))] == ["p1", "p3", "p2", "p0"]
    assert some.progress().note.startswith(f"2 part files of the round before cannot be read ({cut}: ")


def test_an_escalated_tree_goes_before_those_of_fewer_rollouts(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0, escalation=(64,)))
    [first] = some.take("s", 1) or []
    some.publish("s", [(summary(first.problem.id, 0), [None])])
    assert keys(some.take("s", 1)) == [(first.problem.id, 1)]


def test_a_settled_problem_gets_no_further_tree(tmp_path: Path) -> None:
    budget = replace(plan(trees=3, retry_trees=0), settled=2)
    some = board(tmp_path, budget)
    grown = []
    while tasks := some.take("s", 1):
        [(problem, number)] = keys(tasks)
        grown.append((problem, number))
        both = 2 if problem == "p0" else 0
        some.publish("s", [(summary(problem, number, correct=both, wrong=2), [None])])
    assert sorted(grown) == [("p0", 0), *((p, n) for p, n in trees(3) if p != "p0")]
    assert some.progress().settled == 4


def test_a_tree_whose_shard_dies_more_often_than_is_mended_stops_the_round_and_is_named(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0), restarts=3)
    for _ in range(3):
        assert some.take("s", 8)
        some.give_back("s", died=True)
        assert some.progress().failure == ""
    assert some.take("s", 8)
    some.give_back("s", died=True)
    assert "failed 4 times, 3 times are mended (cluster.restarts): its shard died" in some.progress().failure
    assert some.take("s", 1) is None


def test_a_tree_that_its_shard_cannot_grow_stops_the_round_after_as_many_times(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0), restarts=1)
    for expected in ("", "p0 failed 2 times, 1 times are mended (cluster.restarts): no answer"):
        assert some.take("s", 8)
        some.give_up(TreeKey("p0", 0), "no answer")
        assert expected in some.progress().failure
        assert bool(expected) == bool(some.progress().failure)


def test_shards_that_are_told_to_stop_fail_no_tree(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0), restarts=0)
    for number in range(5):
        assert some.take(f"s{number}", 8)
        some.give_back(f"s{number}")
        assert some.progress().failure == ""


def test_a_round_is_done_only_when_its_trees_are_durable(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0))
    tasks = some.take("s", 8) or []
    some.publish("s", [(summary(task.problem.id, 0, correct=1), [None]) for task in tasks])
    assert not some.progress().done
    some.durable(Part("part-a.parquet", tuple(TreeKey(p.id, 0) for p in PROBLEMS)))
    assert some.progress().done


def test_coverage_counts_solved_problems_by_difficulty(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0), (summary("p0", 0, 1), summary("p1", 0), summary("p2", 0, 2, 0)))
    progress = some.progress()
    assert progress.coverage == {"0": (2, 2), "1": (0, 1)}
    assert progress.classes == {"medium": 1, "hard": 1, "easy": 1}
    assert some.unsolved() == ["p1"]


@pytest.mark.parametrize(
    ("correct", "wrong", "expected"), [(3, 0, "easy"), (1, 5, "medium"), (0, 5, "hard"), (0, 0, "hard")]
)
def test_difficulty_classes_are_those_of_rstar_math(correct: int, wrong: int, expected: str) -> None:
    assert difficulty_class(Standing().plus(summary("p", 0, correct, wrong))) == expected


def small_tree(problem: str) -> Tree:
    tree = Tree(problem, 1, 0, 9, (5, 6))
    step = tree.add(0, NodeKind.STEP, "# a", "a = 1", (7,), (-0.5,))
    tree.add(step, NodeKind.TERMINAL, "# b", "print(a)", (8,), (-0.25,), answer="1", correct=True)
    tree.add(step, NodeKind.LOST, "# c", "b = 2", (9,), (-0.5,), status=Status.INFRASTRUCTURE)
    tree.infrastructure_failures = 1
    for node in (0, 1, 2):
        tree.visits[node], tree.value_sum[node] = 2, 2.0
    tree.rollouts, tree.sampled_tokens = 2, 12
    return tree


def test_summaries_of_a_continued_round_are_those_of_its_part_files(tmp_path: Path) -> None:
    part = write_part(tmp_path, "part-a", [to_batch(small_tree("p0")), to_batch(small_tree("p1"))]).name
    found = list(Summaries(tmp_path, (part,)))
    assert [name for _, name in found] == [part] * 2
    assert [(s.executions, s.infrastructure_failures) for s, _ in found] == [(2, 1)] * 2
    assert sorted((s for s, _ in found), key=lambda s: s.problem_id) == [
        summary_of(small_tree("p0")),
        summary_of(small_tree("p1")),
    ]


def test_statistics_of_a_problem_come_from_part_files_and_batches_alike(tmp_path: Path) -> None:
    part = write_part(tmp_path, "part-a", [to_batch(small_tree("p0")), to_batch(small_tree("p1"))]).name
    some = Board(EscalatingBudget(plan()), PROBLEMS, Summaries(tmp_path, (part,)), tmp_path)
    found = some.sources("p1")
    assert (found.batches, found.parts) == ((), (tmp_path / part,))
    second = replace(small_tree("p1"), number=1)
    table = statistics("p1", found.parts, to_batch(second))
    assert table.column("tree").to_pylist() == [0] * 4 + [1] * 4
    assert table.column("q").to_pylist() == [1.0, 1.0, 1.0, 0.0] * 2
    assert table.column("visits").to_pylist() == [2, 2, 2, 0] * 2


def test_the_batch_of_a_tree_leaves_the_object_store_once_the_tree_is_durable(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0))
    some.take("s", 8)
    some.publish("s", [(summary("p0", 0, correct=1), ["the batch"])])
    assert some.sources("p0").batches == ("the batch",)
    assert some.sources("p1").batches == ()
    some.durable(Part("part-a.parquet", (TreeKey("p0", 0),)))
    assert (some.sources("p0").batches, some.sources("p0").parts) == ((), (tmp_path / "part-a.parquet",))


def test_trees_given_back_count_as_nobodys_when_the_rest_is_shared_out(tmp_path: Path) -> None:
    some = board(tmp_path, plan(retry_trees=0))
    assert some.take("b", 0) == []
    assert len(some.take("a", 2) or []) == 2
    some.give_back("a")
    assert len(some.take("a", 64) or []) == 2
    assert len(some.take("b", 64) or []) == 2
