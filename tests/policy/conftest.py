"""A tiny random model for the tests of the policy engine."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def build_tiny_model() -> Callable[..., str]:
    """`build_model` of tests/policy/tiny_model.py."""
    file = Path(__file__).parent / "tiny_model.py"
    spec = importlib.util.spec_from_file_location("tiny_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_model
