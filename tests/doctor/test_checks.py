"""The doctor's checks over invented nodes: every failure is noticed, placed and given its fix."""

from __future__ import annotations

from dataclasses import replace

import pytest
from packaging.specifiers import SpecifierSet

from evolve.attach import LiveNode
from evolve.checks import findings
from evolve.config import load
from evolve.doctor import checks, local, show
from evolve.doctor.checks import GIB, Check, Status, Wanted
from evolve.doctor.facts import (
    GPU,
    PACKAGES,
    ROOT,
    Facts,
    GPUProcess,
    Sandbox,
    Torch,
    parse_gpus,
    parse_processes,
    source_digest,
)
from evolve.doctor.nodes import directory_check, joined
from evolve.schema import WandbConfig, WandbMode

VERSIONS = {"ray": "2.60.0", "vllm": "0.32.0", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.19.0"}
WANTED = Wanted(
    SpecifierSet(">=3.11"),
    {name: SpecifierSet(f"=={version}") for name, version in VERSIONS.items()}
    | {"transformers": SpecifierSet(">=5.16")},
    {"cpu": VERSIONS, "gpu": VERSIONS},
)
H200 = tuple(GPU(i, "NVIDIA H200", "570.86", 143_000, 142_500) for i in range(2))
GOOD = Facts(
    node="a",
    python="3.11.7",
    packages=VERSIONS,
    build="gpu",
    evolve="0" * 64,
    memory_total=64 * GIB,
    memory_free=60 * GIB,
    shm_total=16 * GIB,
    disk_free=500 * GIB,
    disk_at="/shared/runs/x",
    gpus=H200,
    torch=Torch("12.8", 2),
    sandbox=Sandbox("namespaces+landlock6+seccomp+limits"),
)


def of(found: list[Check], status: Status) -> list[Check]:
    return [check for check in found if check.status is status]


def node_checks(facts: Facts, promised: float = 2.0) -> list[Check]:
    return checks.of_node(facts, 100 * GIB, promised, utilization=0.9)


def test_good_nodes_pass_every_check():
    found = [*checks.versions([GOOD, replace(GOOD, node="b")], WANTED), *node_checks(GOOD)]
    assert {check.status for check in found} == {Status.OK}
    assert not checks.failed(found)


@pytest.mark.parametrize(
    ("change", "status", "said", "fix"),
    [
        ({"memory_free": GIB}, Status.FAIL, "1 GiB of 64 GiB free", "end other programs"),
        ({"memory_free": 4 * GIB}, Status.WARN, "4 GiB of 64 GiB free", "cpu_kv_cache_gib"),
        ({"shm_total": 64 * 2**20}, Status.FAIL, "0.0625 GiB", "--shm-size"),
        ({"disk_free": GIB}, Status.FAIL, "1 GiB free at /shared/runs/x", "run.dir"),
        ({"disk_free": 50 * GIB}, Status.WARN, "the plan writes about 100 GiB", "run.dir"),
        ({"gpu_error": "couldn't communicate with the driver"}, Status.FAIL, "nvidia-smi fails", "driver"),
        ({"gpus": H200[:1]}, Status.FAIL, "Ray offers 2 GPUs, the driver lists 1", "--num-gpus"),
        ({"torch": Torch(None, 0)}, Status.FAIL, "torch is a CPU build", "make setup EXTRA=gpu"),
        ({"torch": Torch("13.0", 0)}, Status.FAIL, "CUDA 13.0 sees no GPU with driver 570.86", "install a driver"),
        ({"torch": Torch(error="libcuda.so.1: not found")}, Status.FAIL, "does not import", "make setup"),
        ({"sandbox": Sandbox(error="no seccomp filter")}, Status.FAIL, "no seccomp filter", "libseccomp2"),
        ({"sandbox": Sandbox("x", (), ("network: connected",))}, Status.FAIL, "network: connected", "--self-test"),
        ({"sandbox": Sandbox("x", ("Landlock: too old",))}, Status.WARN, "Landlock: too old", "--self-test"),
    ],
)
def test_what_is_wrong_on_a_node_is_said_with_its_fix(change, status, said, fix):
    bad = [check for check in node_checks(replace(GOOD, **change)) if check.status is not Status.OK]
    assert [check.status for check in bad] == [status]
    assert said in bad[0].what
    assert fix in bad[0].fix
    assert bad[0].where == "a"


def test_leftover_processes_fail_where_they_leave_no_room_for_an_engine():
    process = (GPUProcess(4711, "VLLM::EngineCore", 100_000),)
    full = replace(H200[1], free_mib=43_000)
    (check,) = of(node_checks(replace(GOOD, gpus=(H200[0], full), gpu_processes=process)), Status.FAIL)
    assert "4711 VLLM::EngineCore (100000 MiB); GPU 1: less than 90% of the memory is free" in check.what
    assert check.fix.endswith("kill 4711")
    (check,) = of(node_checks(replace(GOOD, gpu_processes=process)), Status.WARN)
    assert "4711" in check.what


def test_memory_of_a_gpu_that_nobody_visible_holds_fails_too():
    full = replace(H200[1], free_mib=43_000)
    (check,) = of(node_checks(replace(GOOD, gpus=(H200[0], full))), Status.FAIL)
    assert check.what.startswith("GPU 1: less than 90% of the memory is free, held by processes that are not visible")
    assert "outside of any container" in check.fix


def test_a_node_without_gpus_is_fine_where_none_are_promised():
    bare = replace(GOOD, gpus=(), torch=Torch(None, 0))
    assert not checks.failed(node_checks(bare, promised=0.0))


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"python": "3.10.4"}, Status.FAIL, "Python 3.10.4 is not >=3.11"),
        ({"packages": VERSIONS | {"ray": "2.58.0"}}, Status.FAIL, "ray 2.58.0 is not ==2.60.0"),
        ({"packages": VERSIONS | {"transformers": "5.17.0"}}, Status.WARN, "transformers 5.17.0 is not the tested"),
        ({"packages": {k: v for k, v in VERSIONS.items() if k != "vllm"}}, Status.FAIL, "vllm is not installed"),
    ],
)
def test_versions_out_of_range_fail_and_untested_ones_warn(change, status, said):
    found = checks.versions([replace(GOOD, **change)], WANTED)
    assert [check.status for check in found] == [status]
    assert said in found[0].what
    assert "make setup EXTRA=gpu" in found[0].fix


def test_a_local_build_of_a_tested_version_is_that_version():
    found = checks.versions([replace(GOOD, packages=VERSIONS | {"torch": "2.13.0+cu128"})], WANTED)
    assert [check.status for check in found] == [Status.OK]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"python": "3.12.1"}, "Python differs: c has 3.12.1; 2 node(s) have 3.11.7"),
        ({"packages": VERSIONS | {"transformers": "5.18.0"}}, "transformers differs: c has 5.18.0"),
        ({"evolve": "f" * 64}, "evolve differs: c has ffffffffffff; 2 node(s) have 000000000000"),
    ],
)
def test_nodes_that_differ_are_named(change, said):
    three = [GOOD, replace(GOOD, node="b"), replace(GOOD, node="c", **change)]
    (check,) = of(checks.versions(three, WANTED), Status.FAIL)
    assert check.what.startswith(said)
    assert check.where == "cluster"


def test_wanted_versions_are_those_of_this_project():
    wanted = Wanted.read(ROOT)
    assert set(wanted.ranges) == set(PACKAGES) == set(wanted.pins["cpu"]) == set(wanted.pins["gpu"])
    for pins in wanted.pins.values():
        assert all(wanted.ranges[name].contains(version) for name, version in pins.items())


def test_nvidia_smi_is_read_with_names_that_hold_commas_and_memory_it_does_not_tell():
    assert parse_gpus("0, NVIDIA H200, 570.86, 143771, 143001\n\n") == (
        GPU(0, "NVIDIA H200", "570.86", 143771, 143001),
    )
    assert parse_processes("12, python -c x,y, [N/A]\n13, VLLM::EngineCore, 900\n") == (
        GPUProcess(12, "python -c x,y", 0),
        GPUProcess(13, "VLLM::EngineCore", 900),
    )


def test_digest_of_the_sources_changes_with_any_of_them(tmp_path):
    (tmp_path / "evolve").mkdir()
    (tmp_path / "evolve" / "a.py").write_text("x = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "evolve" / "a.py").write_text("x = 2\n")
    assert source_digest(tmp_path) != before


NODE = LiveNode("f" * 56, "gpu-1", "10.0.0.2", 96, 8)


@pytest.mark.parametrize(
    ("reads", "error", "is_read", "status", "said"),
    [
        (True, "", True, Status.OK, "the same one"),
        (False, "", False, Status.FAIL, "is another directory there"),
        (True, "Read-only file system", False, Status.FAIL, "cannot be written: Read-only file system"),
        (True, "", False, Status.FAIL, "does not appear here"),
    ],
)
def test_a_run_directory_that_is_not_shared_is_noticed(tmp_path, reads, error, is_read, status, said):
    check = directory_check(NODE, tmp_path, reads, error, is_read)
    assert (check.status, check.where) == (status, "gpu-1")
    assert said in check.what


def test_nodes_that_have_not_joined_are_counted():
    assert joined([NODE], None, 5).status is Status.OK
    check = joined([NODE], 3, 5)
    assert check.status is Status.FAIL
    assert "1 of 3 nodes have joined within 5 s" in check.what


@pytest.mark.parametrize(
    ("mode", "key", "reaches", "status", "said"),
    [
        (WandbMode.disabled, True, False, Status.OK, "disabled"),
        (WandbMode.offline, True, False, Status.OK, "offline, as configured"),
        (WandbMode.auto, False, False, Status.OK, "there is no key"),
        (WandbMode.auto, True, True, Status.OK, "answers"),
        (WandbMode.auto, True, False, Status.FAIL, "does not answer"),
        (WandbMode.online, False, True, Status.FAIL, "there is no key"),
    ],
)
def test_wandb_is_told_apart_without_showing_the_key(monkeypatch, mode, key, reaches, status, said):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    check = local.wandb(WandbConfig(mode), key, lambda host, port: reaches)
    assert check.status is status
    assert said in check.what
    assert "very-secret" not in check.what + check.fix


def test_ports_in_use_are_named_with_the_option_that_moves_them():
    assert [check.status for check in local.ports(lambda port: False)] == [Status.OK]
    (check,) = local.ports(lambda port: port == 8265)
    assert (check.status, check.what) == (Status.WARN, "8265 is in use")
    assert "--dashboard-port" in check.fix


def test_what_the_plan_lacks_fails():
    assert not checks.failed(local.placement(()))
    assert checks.failed(local.placement(["round 1 search: a shard needs 8 GPUs"]))
    [waits] = local.placement((), ["round 1 search: a shard needs 8 GPUs"])
    assert (waits.status, bool(waits.fix)) == (Status.WARN, True)


def test_every_check_that_is_not_ok_has_a_fix():
    broken = replace(GOOD, memory_free=0, shm_total=0, disk_free=0, gpu_error="x", sandbox=Sandbox(error="x"))
    found = [*node_checks(broken), *checks.versions([broken, replace(GOOD, python="3.9.1", packages={})], WANTED)]
    assert all(check.fix for check in found if check.status is not Status.OK)


def test_nodes_that_say_the_same_share_a_line_and_failures_do_not():
    found = [Check("memory", f"n{i}", Status.OK, f"{i} GiB") for i in range(40)]
    found += [Check("disk", "n1", Status.FAIL, "full", "free some"), Check("disk", "n2", Status.FAIL, "gone", "mount")]
    groups = show.grouped(found)
    assert [(check.name, check.what, len(where)) for check, where in groups] == [
        ("memory", "0 GiB; 1 GiB ... and 38 more", 40),
        ("disk", "full", 1),
        ("disk", "gone", 1),
    ]


def test_a_run_directory_inside_rays_copy_of_the_working_directory_is_refused(monkeypatch, tmp_path):
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    config = load(["run.dir=runs"])
    assert not [finding for finding in findings(config) if finding.key == "run.dir"]
    monkeypatch.chdir(copy)
    (finding,) = [finding for finding in findings(config) if finding.key == "run.dir"]
    assert "EVOLVE_RUNS" in finding.mend
    config.run.dir = str(tmp_path / "shared")
    assert not [finding for finding in findings(config) if finding.key == "run.dir"]


def test_runs_lie_where_the_environment_says_and_an_argument_is_over_it(monkeypatch):
    monkeypatch.setenv("EVOLVE_RUNS", "/shared/runs")
    assert load([]).run.dir == "/shared/runs"
    assert load(["run.dir=mine"]).run.dir == "mine"
    monkeypatch.delenv("EVOLVE_RUNS")
    assert load([]).run.dir == "runs"
