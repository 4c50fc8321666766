"""jobs/kuberay.yaml without a Kubernetes cluster.

Checked: names, types and required fields against a strict excerpt of KubeRay's definition (rayjob.schema.json), Ray's
own reading of the cluster for autoscaling, and that what refers to something refers to something that is there. Not
checked: what only an API server or an operator knows (admission, quotas, the volume claim, the image, device plugins).
"""

from __future__ import annotations

import copy
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from evolve.config import load

ROOT = Path(__file__).parents[2]
JOB: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / "kuberay.yaml").read_text())
SCHEMA = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
PODS = [CLUSTER["headGroupSpec"]["template"]["spec"], *(g["template"]["spec"] for g in CLUSTER["workerGroupSpecs"])]


def test_it_follows_the_definition_of_a_rayjob():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(JOB, SCHEMA)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (["spec"], "entryPoint", "python"),
        (["spec", "rayClusterSpec", "authOptions"], "mode", "on"),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"], "num-gpus", 0),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0], "maxReplica", 3),
        (
            ["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "volumes", 1, "emptyDir"],
            "size",
            "1Gi",
        ),
    ],
)
def test_the_schema_notices_a_field_that_kubernetes_would_drop_or_refuse(path, key, value):
    broken = copy.deepcopy(JOB)
    place = broken
    for part in path:
        place = place[part]
    place[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_ray_reads_a_head_without_gpus_and_gpu_workers_with_bounds():
    resource = {"metadata": {"name": "evolve", "namespace": "default"}, "spec": CLUSTER}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    assert types["headgroup"]["resources"]["GPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 8
    assert 0 < types["gpu"]["min_workers"] < types["gpu"]["max_workers"]


def test_token_authentication_is_on_with_a_ray_that_has_it():
    assert CLUSTER["authOptions"]["mode"] == "token"
    assert CLUSTER["rayVersion"] == metadata.version("ray")


def test_every_mount_has_its_volume_and_all_pods_share_the_run_directory():
    for pod in PODS:
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts.keys() <= volumes
            environment = {entry["name"]: entry["value"] for entry in container["env"]}
            assert environment["EVOLVE_RUNS"].startswith(mounts["shared"])
            assert mounts["shm"] == "/dev/shm"
    (claim,) = {v["persistentVolumeClaim"]["claimName"] for p in PODS for v in p["volumes"] if v["name"] == "shared"}
    assert claim == "evolve-shared"


def test_its_command_is_one_that_the_driver_takes():
    program, *arguments = JOB["spec"]["entrypoint"].split()
    assert [program, *arguments[:2]] == ["python", "-m", "evolve.driver"]
    assert load(arguments[2:]).run.name == "rstar-math-7b"


def test_the_image_copies_what_is_there_and_starts_from_a_python_that_is_supported():
    lines = (ROOT / "jobs" / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"evolve", "conf", "benchmarks", "constraints", "Makefile", "pyproject.toml", "README.md"} <= set(copied)
    assert "FROM python:3.11-slim-bookworm" in lines
