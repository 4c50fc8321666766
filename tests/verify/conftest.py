"""A verifier for the tests of a module."""

from collections.abc import AsyncIterator

import pytest_asyncio

from evolve.schema import VerifierConfig
from evolve.verify.service import SandboxVerifier

CONFIG = VerifierConfig(supervisors=1, cpu_s=3.0, wall_s=60.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def verifier() -> AsyncIterator[SandboxVerifier]:
    verifier = SandboxVerifier(CONFIG)
    yield verifier
    await verifier.close()
