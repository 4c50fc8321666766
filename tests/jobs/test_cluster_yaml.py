"""cluster.yaml through Ray's own preparation and validation, for both of its providers. No machine is reached."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.local.config import bootstrap_local
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()
BLOCK = r"(?ms)^# >>> {name}.*?\n(.*?)^# <<< {name}\n"


def block(name: str) -> str:
    match = re.search(BLOCK.format(name=name), TEXT)
    assert match, name
    return match[1]


def variant(provider: str) -> dict[str, Any]:
    """The file as it is, or as one who follows its comments would edit it."""
    text = TEXT
    if provider == "local":
        own = block("machines of your own")
        assert all(line.startswith("#") for line in own.splitlines())
        text = text.replace(block("AWS"), "").replace(own, re.sub(r"(?m)^# ?", "", own))
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


@pytest.fixture(params=["aws", "local"])
def config(request) -> dict[str, Any]:
    return variant(request.param)


def test_ray_accepts_it(config):
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["cluster_name"] == "evolve"


def test_ray_refuses_it_with_a_key_that_it_does_not_know(config):
    with pytest.raises(Exception, match="head_nodes"):
        validate_config(prepare_config({**config, "head_nodes": 1}))


def test_the_head_has_no_gpu_and_gpu_workers_have_bounds():
    prepared = prepare_config(variant("aws"))
    head, gpu = (prepared["available_node_types"][name] for name in ("head", "gpu"))
    assert prepared["head_node_type"] == "head"
    assert (head["resources"]["GPU"], head["max_workers"]) == (0, 0)
    assert gpu["resources"]["GPU"] == 8
    assert 0 < gpu["min_workers"] < gpu["max_workers"] <= prepared["max_workers"]


def test_machines_of_ones_own_are_all_taken():
    prepared = bootstrap_local(prepare_config(variant("local")))
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(prepared["provider"]["worker_ips"])


def test_every_node_asks_for_the_token_that_is_copied_to_it(config):
    home = f"/home/{config['auth']['ssh_user']}"
    assert config["file_mounts"][f"{home}/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    (head,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--num-gpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head


def test_runs_lie_on_the_storage_that_is_mounted_on_every_node(config):
    mounted = " ".join(config["initialization_commands"])
    assert re.search(r"mount -t nfs4 \S+ \S+ \S+ /shared", mounted)
    assert any("EVOLVE_RUNS=/shared/runs" in command for command in config["setup_commands"])


def test_what_is_mounted_is_there_and_is_enough_to_set_up(config):
    sources = {remote: ROOT / local for remote, local in config["file_mounts"].items() if not local.startswith("~")}
    assert all(path.exists() for path in sources.values())
    needed = {"Makefile", "pyproject.toml", "README.md", "constraints", "evolve", "benchmarks"}
    assert {Path(remote).name for remote in sources} == needed


def test_its_commands_are_shell(config):
    for command in commands(config):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=10, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert shlex.split(command)


def test_its_ray_start_options_exist(config):
    from ray.scripts.scripts import start

    known = {name for option in start.params for name in option.opts}
    for command in commands(config):
        if "ray start" in command:
            assert set(re.findall(r"--[a-z-]+", command)) <= known


def test_the_commands_in_its_head_are_the_documented_ones():
    for command in ("ray up cluster.yaml", "ray job submit --working-dir . -- python -m evolve.driver"):
        assert command in TEXT
        assert command in (ROOT / "README.md").read_text()
