"""What a node is said to have died of."""

import os
import signal

import pytest

from evolve.verify.deaths import cause_of_death
from tests.verify.support import dead_sender, early_deaths_are_known


@pytest.mark.skipif(not early_deaths_are_known(), reason="this kernel does not tell (before Linux 6.17)")
@pytest.mark.parametrize(
    ("number", "for_memory", "status"),
    [
        (signal.SIGKILL, None, "infrastructure"),
        (signal.SIGKILL, True, "oom"),
        (signal.SIGKILL, False, "infrastructure"),
        (signal.SIGXCPU, False, "timeout"),
        (signal.SIGTERM, True, "crash"),
    ],
)
def test_what_died_before_its_greeting_was_read_has_a_cause(number: int, for_memory: bool | None, status: str) -> None:
    def die() -> None:
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)  # a test before may have started Ray here, which handles SIGTERM
        os.kill(os.getpid(), number)

    pidfd = dead_sender(die)
    try:
        death = cause_of_death(pidfd, for_memory)
        assert (death.status, death.certain) == (status, status != "infrastructure")
    finally:
        os.close(pidfd)


@pytest.mark.parametrize(("for_memory", "status"), [(None, "crash"), (False, "crash"), (True, "oom")])
def test_where_the_exit_status_is_not_told_the_control_groups_count_decides(
    for_memory: bool | None, status: str
) -> None:
    death = cause_of_death(-1, for_memory)
    assert (death.status, death.certain) == (status, status == "oom")
