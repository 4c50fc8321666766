"""Fixtures shared by all tests: one local Ray cluster a session, which under `pytest -n` each of its processes has."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with four pretended CPUs, shared by every test that needs Ray; never one that runs here."""
    import ray

    ray.init(address="local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=True)
    yield
    ray.shutdown()
