"""One vLLM engine in this process' care: starting it, swapping its weights, watching it.

Shared by the policy engine and the PPM engine. vLLM is imported only once `start` runs, after its
environment is set, for it reads the environment at import.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import psutil

from evolve.policy.checkpoint import DigestMismatch, resolve, verify
from evolve.schema import EngineConfig, Precision
from evolve.service import ServiceError

CPU_BLOCK_SIZE = 32
"""Tokens of a KV block on CPUs, where vLLM's kernels need a multiple of 32; the smallest shares most."""

CPU_BATCH_TOKENS = 4096
"""Tokens of one forward pass on CPUs, unless one prompt may be longer."""


class EngineNotStarted(RuntimeError):
    """A request came before `start` had returned, or after `close`."""


def prepare_environment(config: EngineConfig, device: str) -> None:
    """Set what vLLM reads from the environment; to be called before vLLM is first imported.

    Nothing is reported to vLLM's usage service. On CPUs the engine core runs its model itself
    (`VLLM_ENABLE_V1_MULTIPROCESSING=0`: else every engine is three processes) and threads float,
    because several engines share a machine's cores; their number is `OMP_NUM_THREADS`, which Ray
    sets to the actor's CPUs.
    """
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device == "cpu":
        os.environ["VLLM_TARGET_DEVICE"] = "cpu"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def engine_arguments(model: str, config: EngineConfig, device: str, **extra: Any) -> dict[str, Any]:
    """Keyword arguments of vLLM's `AsyncEngineArgs` for an engine."""
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": "float32" if config.precision is Precision.fp32 else "bfloat16",
        "max_num_seqs": config.max_num_seqs,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.tensor_parallel,
        # On CPUs always: compiling takes 8 to 35 s of start-up for a tenth more tokens a second (tiny model).
        "enforce_eager": config.enforce_eager or device == "cpu",
        "enable_prefix_caching": True,
        "worker_extension_cls": "evolve.policy.worker.WorkerExtension",
        "disable_log_stats": True,
        "enable_log_requests": False,
        # Sampling is seeded by request; defaults of a model's generation_config would bend it.
        "generation_config": "vllm",
    }
    if device == "cpu":
        arguments |= {
            "kv_cache_memory_bytes": int(config.cpu_kv_cache_gib * 2**30),
            "block_size": CPU_BLOCK_SIZE,
            # vLLM 0.32 rewinds a seeded request's generator after each part of a divided prefill, as
            # only CUDA generators can be: on a CPU that kills the engine. So prefills are not divided.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(config.max_model_len, CPU_BATCH_TOKENS),
        }
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    return arguments | extra


class Engine:
    """A vLLM `AsyncLLM` with an identified checkpoint: the part common to policy and PPM.

    A plain class with coroutines, to be used directly or as a Ray actor with a high
    `max_concurrency`. When vLLM's engine core dies, or answers nothing at all for
    `config.request_timeout_s`, a Ray actor exits, so that Ray starts a fresh one; outside Ray the
    error is raised.
    """

    def __init__(self, model: str, config: EngineConfig, digest: str | None = None, device: str = "cpu"):
        """
        Args:
            model: checkpoint directory, or a hub name.
            config: the engine's settings.
            digest: the checkpoint's expected `checkpoint.digest`; None takes it as found.
            device: `cpu` or `gpu`.
        """
        if device not in ("cpu", "gpu"):
            raise ValueError(f"device={device!r}: an engine runs on 'cpu' or 'gpu'")
        self.config = config
        self.device = device
        self.digest = digest
        self.path = model
        self._llm: Any = None
        self._ids = itertools.count()
        self._changing = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = asyncio.Event()
        self._open.set()
        self._counts: dict[str, float] = {
            "requests": 0, "prompt_tokens": 0, "generated_tokens": 0, "refused": 0, "reloads": 0,
        }  # fmt: skip
        self._sequences = 0
        self._occupied_s = 0.0
        self._busy_s = 0.0
        self._changed = time.monotonic()
        self._answered = -math.inf
        """When vLLM last answered a request."""
        self._ready_s = math.nan

    # ------------------------------------------------------------------ life-cycle

    async def start(self) -> str:
        """Check the checkpoint, load it and get ready; return the checkpoint's digest.

        Idempotent. Raises `checkpoint.DigestMismatch`, or what vLLM raises on a model it cannot serve.
        """
        async with self._changing:
            if self._llm is None:
                began = time.monotonic()
                # In a thread: importing vLLM takes seconds, in which the actor must answer.
                self._llm = await asyncio.to_thread(self._build)
                owner = (os.getpid(), psutil.Process().create_time())
                await self._llm.collective_rpc("end_with", args=owner)
                await self._warm_up()
                self._ready_s = time.monotonic() - began
        return str(self.digest)

    def _build(self) -> Any:
        prepare_environment(self.config, self.device)
        self.path = resolve(self.path)
        self.digest = verify(self.path, self.digest)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self.path, self.config, self.device, **self._extra_arguments())
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    def _extra_arguments(self) -> dict[str, Any]:
        """Further engine arguments of the kind of engine."""
        return {}

    async def _warm_up(self) -> None:
        """A first request, so that the first real one does not pay for lazy set-up."""

    async def reload(self, path: str, digest: str | None = None) -> str:
        """Swap in another checkpoint of the same architecture, in place; return its digest.

        Requests in flight finish under the old weights, later ones wait, and the prefix cache is
        emptied, so that no request mixes two policies.

        Raises:
            DigestMismatch: the checkpoint is not the expected one; the old weights still serve.
            ValueError: its config.json describes another model; start a new engine for that.
        """
        llm = self._started()
        async with self._changing:
            path = await asyncio.to_thread(resolve, path)
            found = await asyncio.to_thread(verify, path, digest)
            if found == self.digest:
                return found
            await asyncio.to_thread(self._check_same_model, path)
            self._open.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), self.config.request_timeout_s)
                await llm.collective_rpc("load_checkpoint", args=(path,))
                if not await llm.reset_prefix_cache():
                    raise RuntimeError(f"reload of {path}: vLLM did not empty its prefix cache")
                # The files might have been replaced while they were being read.
                after = await asyncio.to_thread(verify, path, None)
                if after != found:
                    self.digest = None
                    raise DigestMismatch(f"checkpoint {path} changed while it was loaded; reload it")
                self.path, self.digest = path, found
                self._counts["reloads"] += 1
            except Exception as error:
                self._exit_if_dead(error)
                raise
            finally:
                self._open.set()
        return found

    def _check_same_model(self, path: str) -> None:
        """Refuse (ValueError) a checkpoint whose weights cannot be swapped in for the present ones."""
        from transformers import AutoConfig

        ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
        old, new = (AutoConfig.from_pretrained(p).to_dict() for p in (self.path, path))
        differing = sorted(key for key in (old.keys() | new.keys()) - ignored if old.get(key) != new.get(key))
        if differing:
            raise ValueError(
                f"reload of {path}: its config.json differs from that of {self.path} in "
                f"{', '.join(differing)}; start a new engine for another architecture"
            )

    async def health(self) -> str:
        """The digest being served; raises when the engine is dead or was never started."""
        try:
            await self._started().check_health()
        except Exception as error:
            self._exit_if_dead(error)
            raise
        return str(self.digest)

    async def close(self) -> None:
        """Stop the engine and its processes. Idempotent."""
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)

    async def stats(self) -> dict[str, float]:
        """Counters since the start and the state now.

        `requests`, `prompt_tokens`, `generated_tokens`; `refused`: prefixes too long for the model;
        `reloads`; `running` and `waiting` sequences now; `occupancy`: mean share of `max_num_seqs`
        in use while there was any work; `busy_s`: seconds with any work; `ready_s`: seconds that
        `start` took.
        """
        self._count_sequences(0)
        limit = self.config.max_num_seqs
        occupancy = self._occupied_s / self._busy_s / limit if self._busy_s else 0.0
        return self._counts | {
            "running": min(self._sequences, limit),
            "waiting": max(self._sequences - limit, 0),
            "occupancy": occupancy,
            "busy_s": self._busy_s,
            "ready_s": self._ready_s,
        }

    # ------------------------------------------------------------------ requests

    def _started(self) -> Any:
        if self._llm is None:
            raise EngineNotStarted(f"the engine of {self.path} is not running; await start() first")
        return self._llm

    def _request_id(self) -> str:
        return str(next(self._ids))

    async def _run(self, sequences: int, stream: Callable[[], Any]) -> Any:
        """The last output of one vLLM request, once no reload is under way.

        Raises:
            ServiceError: it did not come within `config.request_timeout_s`.
        """
        self._started()
        while not self._open.is_set():
            await self._open.wait()
        self._count_sequences(sequences)
        self._counts["requests"] += 1
        limit, began = self.config.request_timeout_s, time.monotonic()
        try:
            async with asyncio.timeout(limit):
                final = None
                async for output in stream():
                    final = output
            self._answered = time.monotonic()
        except TimeoutError as error:
            self._exit_if_dead(error)
            if self._answered < began:
                _end_actor()  # it hangs: no request that came since will fare better
            raise ServiceError(f"the engine of {self.path} has not answered a request for {limit:.0f} s") from error
        except Exception as error:
            self._exit_if_dead(error)
            raise
        finally:
            self._count_sequences(-sequences)
        return final

    def _count_sequences(self, change: int) -> None:
        now = time.monotonic()
        if self._sequences:
            elapsed = now - self._changed
            self._busy_s += elapsed
            self._occupied_s += elapsed * min(self._sequences, self.config.max_num_seqs)
        self._changed = now
        self._sequences += change
        if self._sequences:
            self._idle.clear()
        else:
            self._idle.set()

    def _exit_if_dead(self, error: BaseException) -> None:
        """End the Ray actor when the engine core is dead: every retry would meet the same corpse."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, EngineDeadError) or (self._llm is not None and self._llm.errored):
            _end_actor()


def _end_actor() -> None:
    """Leave the process if it is a Ray actor's; outside Ray do nothing."""
    import ray

    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        # Not exit_actor(): that counts as intended, and Ray does not restart such an actor.
        os._exit(70)
