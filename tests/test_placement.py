"""Placement over node resources: what goes where, and what each node lacks. Without Ray."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.config import load
from evolve.estimate import plan
from evolve.placement import Need, Node, Resources, amount, lay_out, room, shards, shortfalls
from evolve.plan import WIDTH, render

HEAD = Node(cpus=8, name="head")
EIGHT = [Node(cpus=96, gpus=8, name=f"gpu-{i}") for i in range(3)]
SHARD = Need(cpus=10, gpus=2)


@pytest.mark.parametrize(
    ("node", "need", "expected"),
    [
        (Node(96, 8), Need(10, 2), 4),
        (Node(25, 8), Need(10, 2), 2),
        (Node(96, 0), Need(10, 2), 0),
        (Node(4, 0.9), Need(0.5, 0.3), 3),
        (Node(4), Need(0.0), 1),
    ],
    ids=["gpus are scarce", "cpus are scarce", "no gpu", "shares of a gpu", "nothing needed"],
)
def test_room_is_bounded_by_the_scarcer_resource(node, need, expected):
    assert room(node, need) == expected


def test_a_head_without_gpus_gets_no_shard_and_the_others_all_they_hold():
    layout = lay_out("round 3", [HEAD, *EIGHT], SHARD, wanted=None)
    assert [share.groups for share in layout.shares] == [0, 4, 4, 4]
    assert layout.complete


def test_no_more_is_placed_than_wanted():
    layout = lay_out("round 3", [HEAD, *EIGHT], SHARD, wanted=5)
    assert [share.groups for share in layout.shares] == [0, 4, 1, 0]
    assert layout.complete


@pytest.mark.parametrize(("wanted", "expected"), [(None, [1, 1]), (3, [3, 0])])
def test_without_gpus_a_node_takes_one_shard_unless_more_are_asked_for(wanted, expected):
    layout = shards("any", [Node(cpus=4), Node(cpus=4)], Need(0.5), wanted)
    assert [share.groups for share in layout.shares] == expected


def test_what_is_missing_is_said_node_by_node_and_once_for_nodes_alike():
    layout = lay_out("round 3", [HEAD, *EIGHT], SHARD, wanted=13)
    assert not layout.complete
    assert shortfalls(layout) == ["head: 2 CPUs and 2 GPUs short", "gpu-0, gpu-1, gpu-2: 2 GPUs short"]


def test_many_nodes_alike_are_counted():
    nodes = [Node(cpus=2, name=f"n{i}") for i in range(40)]
    (line,) = shortfalls(lay_out("round 1", nodes, Need(10), None))
    assert line == "n0, n1, n2, n3, n4, n5 and 34 more: 8 CPUs short"


def test_amounts_are_read_aloud():
    assert [amount(n) for n in (Need(1), Need(2, 1), Need(0, 0.45), Need(0))] == [
        "1 CPU",
        "2 CPUs and 1 GPU",
        "0.45 GPUs",
        "nothing",
    ]


@given(
    nodes=st.lists(st.builds(Node, cpus=st.integers(0, 64), gpus=st.integers(0, 8)), max_size=8),
    need=st.builds(Need, cpus=st.sampled_from([0.5, 1.0, 10.0]), gpus=st.sampled_from([0.0, 0.45, 1.0, 8.0])),
    wanted=st.none() | st.integers(1, 20),
)
def test_no_node_is_given_more_than_it_has(nodes, need, wanted):
    layout = lay_out("any", nodes, need, wanted)
    for share in layout.shares:
        assert share.groups * need.cpus <= share.node.cpus + 1e-6
        assert share.groups * need.gpus <= share.node.gpus + 1e-6
    assert wanted is None or layout.placed <= wanted
    assert layout.complete == (layout.placed >= (wanted or 1))


def test_the_plan_shows_every_node_with_what_it_takes():
    text = render(plan(load(["conf=rstar_math"]), Resources((HEAD, *EIGHT))))
    table = text[text.index("by node") :]
    rows = {line.split()[0]: line.split() for line in table.splitlines()[:9] if line.strip()}
    assert rows["head"] == ["head", "8", "0", "-", "-", "-", "-"]
    assert rows["gpu-0,"][-6:] == ["96", "8", "1", "8", "4", "8"]
    assert "gpu-0, gpu-1, gpu-2" in text


def test_the_plan_says_what_each_node_lacks_and_still_fits_the_width():
    small = Resources((HEAD, Node(cpus=16, gpus=4, name="small-gpu")))
    text = render(plan(load(["conf=rstar_math", "round=1"]), small))
    assert max(map(len, text.splitlines())) <= WIDTH
    missing = " ".join(text[text.index("missing on this cluster") :].split())
    assert "a shard needs 10 CPUs and 8 GPUs on one node; shards that fit: 0 of 1" in missing
    assert "head: 2 CPUs and 8 GPUs short; small-gpu: 4 GPUs short" in missing


def test_trainers_have_what_shards_leave_on_cpus_and_everything_on_gpus():
    on_cpus = plan(load(["cluster.verifier_cpus=3"]), Resources((Node(cpus=4, name="a"), Node(cpus=3, name="b"))))
    assert [share.groups for share in on_cpus.layouts[-1].shares] == [2, 0]
    assert on_cpus.missing == ()
    on_gpus = plan(load(["conf=rstar_math"]), Resources((HEAD, *EIGHT)))
    assert [share.groups for share in on_gpus.layouts[-1].shares] == [0, 8, 8, 8]


def test_trainers_without_room_are_missing_by_node():
    found = plan(load(["sft.cpus_per_worker=8"]), Resources((Node(cpus=2, name="a"),)))
    assert "training: 2 workers of 8 CPUs each, room for 0. a: 6.5 CPUs short" in found.missing
