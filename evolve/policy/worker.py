"""What runs inside vLLM's worker process: loading another checkpoint in place, and ending with the engine's owner."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

import psutil

OWNER_POLL_S = 1.0


class WorkerExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`); methods are called by `collective_rpc`."""

    model_runner: Any

    def end_with(self, owner: int, started: float) -> None:
        """End this process soon after process `owner`, which began at `started` (seconds since 1970), has ended.

        vLLM's engine core and its workers are processes of their own, which a killed owner cannot end: they would keep
        the GPU. With more than one worker, this one is a child of the core, which then goes as well: left alone, it
        outlives its workers.
        """
        if owner != os.getpid():
            threading.Thread(target=_end_with, args=(owner, started, _between(owner)), daemon=True).start()

    def load_checkpoint(self, path: str) -> int:
        """Load the weights of a checkpoint directory into the running model; return how many layers were repacked.

        vLLM's CPU build keeps a packed copy of each matrix for its kernels. `reload_weights` (0.32) packs
        again what it loads, but an output layer tied to the embedding is not in the checkpoint: it would go
        on multiplying with the old copy. So every layer that kept its plain matrix is packed again.
        """
        self.model_runner.reload_weights(weights_path=path)
        repacked = 0
        for layer in self.model_runner.get_model().modules():
            if hasattr(layer, "cpu_linear") and layer.weight.numel():
                from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
                repacked += 1
        return repacked


def _between(owner: int) -> list[psutil.Process]:
    """The processes above this one and below its owner."""
    parents = psutil.Process().parents()
    pids = [parent.pid for parent in parents]
    return parents[: pids.index(owner)] if owner in pids else []


def _end_with(owner: int, started: float, between: list[psutil.Process]) -> None:
    while True:
        try:
            alive = abs(psutil.Process(owner).create_time() - started) < 1.0
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            for process in between:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            os._exit(70)
        time.sleep(OWNER_POLL_S)
