"""Where memory control groups are looked for, in both versions of the interface, and what is read there.

A tree of files stands in for the kernel's: it shows what is read and written, not what the kernel does with it.
"""

from pathlib import Path

import pytest

from evolve.verify import cgroups


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /sys/fs/cgroup, with this process in the groups that `self` names."""
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(cgroups, "_ROOT", root)
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "self")
    return root


def belong(tree: Path, text: str) -> None:
    (tree.parent / "self").write_text(text)


def hand_down(group: Path, controllers: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "cgroup.subtree_control").write_text(controllers + "\n")


def test_version_two_takes_the_nearest_group_that_hands_memory_down(tree: Path) -> None:
    belong(tree, "0::/user.slice/app.slice/run.scope\n")
    hand_down(tree, "cpu io memory pids")
    hand_down(tree / "user.slice", "memory pids")
    hand_down(tree / "user.slice" / "app.slice", "cpu memory")
    hand_down(tree / "user.slice" / "app.slice" / "run.scope", "")
    assert [group.name for group in cgroups._candidates()] == ["app.slice", "user.slice", "cgroup"]


def test_version_two_without_memory_handed_down_offers_nothing(tree: Path) -> None:
    belong(tree, "0::/\n")
    hand_down(tree, "cpu pids")
    assert list(cgroups._candidates()) == []


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_version_one_takes_the_hierarchy_of_memory(tree: Path, controllers: str) -> None:
    belong(tree, f"9:name=systemd:/\n4:{controllers}:/job\n3:cpuset:/other\n0::/\n")
    assert list(cgroups._candidates()) == [tree / controllers / "job", tree / controllers]


@pytest.mark.parametrize("limit", ["memory.max", "memory.limit_in_bytes"])
def test_a_group_gets_its_limit_in_the_file_of_its_version(
    tree: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def as_the_kernel(self: Path, *args: object, **named: object) -> None:
        mkdir(self, *args, **named)  # type: ignore[arg-type]
        (self / limit).write_text("max")

    monkeypatch.setattr(Path, "mkdir", as_the_kernel)
    group = cgroups.make(tree, "light", 1 << 30)
    assert (group.parent, (group / limit).read_text()) == (tree, str(1 << 30))


def test_a_parent_that_hands_no_memory_down_is_refused_and_nothing_is_left(tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match="hands no memory controller down"):
        cgroups.make(tree, "light", 1 << 30)
    assert list(tree.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "kills"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 19\noom 1\noom_kill 2\noom_group_kill 0\n", 2),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", None),
    ],
)
def test_kills_for_memory_are_counted_by_either_version(tree: Path, name: str, text: str, kills: int | None) -> None:
    (tree / name).write_text(text)
    assert cgroups.oom_kills(tree) == kills


def test_where_no_version_is_there_nothing_is_known(tree: Path) -> None:
    assert cgroups.oom_kills(tree) is None
