"""The command under test: the driver's own main, with other engines where asked, told from outside who is who."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from evolve.fleet import Engines
from evolve.schema import EvolveConfig

PIDS = "pids.json"


def served(config: EvolveConfig) -> Engines:
    """The engines that users have."""
    return Engines()


def drive(engines: str, arguments: Sequence[str]) -> int:
    """Run `evolve.driver` with the engines that `module:function` makes, and keep its actors' process ids in a file.

    Trainers are the real ones, on CPUs also where nodes pretend to have GPUs.
    """
    from evolve import driver, stages
    from evolve.stages import run as running

    os.environ["DS_ACCELERATOR"] = "cpu"
    module, _, function = engines.partition(":")
    make = getattr(importlib.import_module(module), function)
    open_run, workers = stages.open_run, running.trainer_workers

    @contextmanager
    def opened(config: Any) -> Iterator[Any]:
        with open_run(config, make(config)) as run:
            threading.Thread(target=_tell_pids, args=(run,), daemon=True).start()
            yield run

    stages.open_run = opened  # type: ignore[assignment]
    running.trainer_workers = lambda config, *_: replace(workers(config, "cpu"), gpu=False)
    return driver.main(arguments)


def _tell_pids(run: Any) -> None:
    aside = run.directory.path / f"{PIDS}.new"
    while True:
        with contextlib.suppress(OSError):  # a full disk is what the driver itself is to speak of
            aside.write_text(json.dumps(run.fleet.watch.pids()))
            aside.replace(run.directory.path / PIDS)
        time.sleep(0.2)
