"""`python -m evolve.doctor.sandbox`: the sandbox's self-test in its quick form, as one line of JSON.

`python -m evolve.verify --self-test` is the whole of it.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from evolve.schema import VerifierConfig
from evolve.verify.layers import SandboxUnavailable
from evolve.verify.selftest import SelfTest, Snippet


def snippets(port: int) -> list[Snippet]:
    """One snippet a promise of the sandbox. `port`: something listens there on this machine's loopback."""
    connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint('connected')"
    look = "import os\nprint(sorted(os.environ.items()))"
    return [
        Snippet("ordinary code", "print(6 * 7)", {"status_in": ["ok"], "stdout_contains": ["42"]}),
        Snippet("network", connect, {"status_in": ["error", "crash"], "stdout_not_contains": ["connected"]}),
        Snippet("environment", look, {"status_in": ["ok", "error", "crash"]}),
        Snippet("endless loop", "while True: pass", {"status_in": ["timeout"]}, timeout_s=0.5),
    ]


async def quick() -> dict[str, Any]:
    """`tier`, `missing` and `failures` of this machine's sandbox; `error` when there is none."""
    test = SelfTest(VerifierConfig(supervisors=1))
    try:
        await test.prepare(warm=0)
        found = await test.verifier.describe()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            reports = [await test.one(snippet, alone=True) for snippet in snippets(port)]
    except (SandboxUnavailable, RuntimeError) as error:
        return {"error": str(error)}
    finally:
        await test.verifier.close()
    failures = [f"{report.name}: {'; '.join(report.failures)}" for report in reports if report.failures]
    return {"tier": found["tier"], "missing": found["missing"], "failures": failures}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(quick())))
