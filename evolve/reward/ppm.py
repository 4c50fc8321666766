r"""The PPM engine: values steps with a process preference model served by vLLM.

Two forms behind one interface:

`head`
    A Hugging Face sequence classifier with one output, the form of rStar-Math (arXiv 2501.04519).
    The raw score of a step is the scalar at the step's last token, given everything before it.

`logprob`
    A causal language model. The raw score of a step is the summed log-probability of the step's
    sampled tokens given everything before it: :math:`\sum_t \log p(x_t \mid x_{<t})`. This departs
    from rStar-Math and is kin to implicit process rewards (arXiv 2412.01981).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from evolve.policy.serving import Engine
from evolve.schema import EngineConfig, ScoreForm
from evolve.types import ScoreRequest

KEPT_SCORES = 200_000
"""Step scores kept, so that a path that grows by a step is not scored from its beginning again."""


class PrefixTooLong(ValueError):
    """A prefix does not fit the PPM's context. It is never cut: another prefix would be scored."""


class PPMEngine(Engine):
    """A `Reward` around vLLM's `AsyncLLM`: a Ray actor, or used directly.

    Scores depend on the request alone, not on what it is batched with (but for rounding, which is
    why fp32 and bf16 differ in the third digit).
    """

    def __init__(
        self,
        model: str,
        form: ScoreForm,
        score_scale: float,
        config: EngineConfig,
        digest: str | None = None,
        device: str = "cpu",
    ):
        """
        Args:
            model: checkpoint directory, or a hub name.
            form: what a step's score is.
            score_scale: what a raw score is multiplied with before tanh.
            config: the engine's settings.
            digest: the checkpoint's expected `checkpoint.digest`; None takes it as found.
            device: `cpu` or `gpu`.
        """
        super().__init__(model, config, digest, device)
        self.form = form
        self.score_scale = score_scale
        self._limit = config.max_model_len
        self._kept: OrderedDict[bytes, float] = OrderedDict()
        self._counts |= {"kept_hits": 0, "rescored": 0}

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """Value of each prefix in (-1, 1): tanh(score_scale · raw).

        `head`: raw is the score of the last step, for the scalar at its last token values the whole
        prefix; without steps, the score at the prompt's last token. `logprob`: raw is the sum of
        the step scores, 0 without steps.

        Raises:
            PrefixTooLong: a request does not fit; nothing of the call is scored.
        """
        self._refuse_long(requests)
        if self.form is ScoreForm.logprob:
            raw = [math.fsum(scores) for scores in await self.score_steps(requests)]
        else:
            raw = list(await asyncio.gather(*(self._head(_ids(request)) for request in requests)))
        return [math.tanh(self.score_scale * value) for value in raw]

    async def score_steps(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Raw score of every step of each request, in the steps' order.

        For `logprob` a trajectory's score in best-of-N and beam search is the sum over its steps.

        Raises:
            PrefixTooLong: a request does not fit; nothing of the call is scored.
        """
        self._refuse_long(requests)
        scorer = self._logprob_steps if self.form is ScoreForm.logprob else self._head_steps
        return list(await asyncio.gather(*(scorer(request) for request in requests)))

    async def reload(self, path: str, digest: str | None = None) -> str:
        """As `Engine.reload`; kept scores of the old weights are forgotten."""
        found = await super().reload(path, digest)
        self._kept.clear()
        return found

    # ------------------------------------------------------------------ inside

    def _extra_arguments(self) -> dict[str, Any]:
        if self.form is ScoreForm.head:
            return {"runner": "pooling", "skip_tokenizer_init": True}
        from transformers import AutoConfig

        # Log-probabilities of a prompt come with one sampled token, which needs a place of its own.
        positions = AutoConfig.from_pretrained(self.path).max_position_embeddings
        length = min(self.config.max_model_len + 1, positions)
        self._limit = min(self.config.max_model_len, length - 1)
        return {"max_model_len": length, "logprobs_mode": "raw_logprobs", "skip_tokenizer_init": True}

    async def _warm_up(self) -> None:
        request = ScoreRequest(prompt_ids=(0, 1), steps=((2, 3),), sampled=((True, True),))
        await self.score_steps([request])
        self._counts = dict.fromkeys(self._counts, 0.0)
        self._kept.clear()

    def _refuse_long(self, requests: Sequence[ScoreRequest]) -> None:
        for request in requests:
            length = len(request.prompt_ids) + sum(map(len, request.steps))
            if length > self._limit:
                self._counts["refused"] += 1
                raise PrefixTooLong(
                    f"PPM: a prefix of {length} tokens, but at most {self._limit} can be scored; raise "
                    "ppm.engine.max_model_len to policy.engine.max_model_len or more"
                )

    async def _head_steps(self, request: ScoreRequest) -> list[float]:
        ids, ends = list(request.prompt_ids), []
        for step in request.steps:
            ids.extend(step)
            ends.append(len(ids))
        return list(await asyncio.gather(*(self._head(ids[:end]) for end in ends)))

    async def _head(self, ids: Sequence[int]) -> float:
        """The scalar head's output at the last of `ids`."""
        from vllm import PoolingParams

        key = _key(ids)
        if (kept := self._recall(key)) is not None:
            return kept
        llm = self._started()
        # Without an activation: vLLM would apply a sigmoid to a single label.
        parameters = PoolingParams(use_activation=False, task="classify")
        prompt = {"prompt_token_ids": list(ids)}
        output = await self._run(1, lambda: llm.encode(prompt, parameters, self._request_id()))
        self._counts["prompt_tokens"] += len(ids)
        return self._keep(key, float(output.outputs.data.item()))

    async def _logprob_steps(self, request: ScoreRequest) -> list[float]:
        """Summed log-probabilities of each step; steps scored before are not scored again."""
        ids = _ids(request)
        keys, spans, end = [], [], len(request.prompt_ids)
        for step, sampled in zip(request.steps, request.sampled, strict=True):
            start, end = end, end + len(step)
            spans.append((start, sampled))
            keys.append(_key(ids[:end], sampled))
        scores = [self._recall(key) for key in keys]
        missing = [index for index, score in enumerate(scores) if score is None]
        if missing:
            last = spans[missing[-1]]
            logprobs = await self._logprobs(ids[: last[0] + len(last[1])], spans[missing[0]][0])
            for index in missing:
                start, sampled = spans[index]
                taken = logprobs[start : start + len(sampled)]
                total = math.fsum(value for value, mark in zip(taken, sampled, strict=True) if mark)
                scores[index] = self._keep(keys[index], total)
        return [score for score in scores if score is not None]

    async def _logprobs(self, ids: list[int], first: int) -> list[float]:
        """Log-probability of each of `ids` given those before it, meaningful from index `first` on.

        Prompt log-probabilities are computed only where the prefix cache does not reach. Reading
        the cache is right as long as it ends before the first token asked for; where it reaches
        further (a sibling began alike), the request is made again without it.
        """
        output = await self._generate(ids, read_cache=True)
        # The row that predicts token `first` is computed from position `first - 1`.
        if output.num_cached_tokens and output.num_cached_tokens > first - 1:
            self._counts["rescored"] += 1
            output = await self._generate(ids, read_cache=False)
        # One entry a token but the first of the prompt, which has no log-probability.
        return [math.nan, *output.prompt_logprobs.logprobs]

    async def _generate(self, ids: list[int], read_cache: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm = self._started()
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=not read_cache,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": ids}
        output = await self._run(1, lambda: llm.generate(prompt, parameters, self._request_id()))
        self._counts["prompt_tokens"] += len(ids)
        return output

    def _recall(self, key: bytes) -> float | None:
        score = self._kept.get(key)
        if score is not None:
            self._kept.move_to_end(key)
            self._counts["kept_hits"] += 1
        return score

    def _keep(self, key: bytes, score: float) -> float:
        if not math.isfinite(score):
            raise RuntimeError(
                f"PPM {self.path}: a score is {score}; the checkpoint is broken, or overflows in "
                f"{self.config.precision.value}: train it again, or set ppm.engine.precision=fp32"
            )
        self._kept[key] = score
        if len(self._kept) > KEPT_SCORES:
            self._kept.popitem(last=False)
        return score


def _ids(request: ScoreRequest) -> list[int]:
    ids = list(request.prompt_ids)
    for step in request.steps:
        ids.extend(step)
    return ids


def _key(ids: Sequence[int], sampled: Sequence[bool] = ()) -> bytes:
    """A short key of a prefix and of which tokens of its last step count."""
    content = hashlib.blake2b(array("q", ids).tobytes(), digest_size=16)
    content.update(bytes(sampled))
    return content.digest()
