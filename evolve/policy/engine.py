"""The policy engine: samples steps from a language model served by vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from evolve.policy.serving import Engine
from evolve.schema import EngineConfig
from evolve.types import Candidate, Sampling

Request = tuple[tuple[int, ...], int, Sampling]
"""A prefix (token ids), the number of samples, and how to sample."""


class PolicyEngine(Engine):
    """A `Policy` around vLLM's `AsyncLLM`: a Ray actor, or used directly.

    Every request waits for its own samples alone, so calls may be made as they come; vLLM batches
    whatever is in flight. Samples are taken as ids, and a candidate's text is the decoding of
    exactly its ids.
    """

    def __init__(self, model: str, config: EngineConfig, digest: str | None = None, device: str = "cpu"):
        """As `Engine`."""
        super().__init__(model, config, digest, device)
        self._end_tokens: frozenset[int] = frozenset()
        """Ids at which the model ends a text."""
        self._singles: dict[str, int | None] = {}

    async def propose(self, prefixes: Sequence[tuple[int, ...]], n: int, sampling: Sampling) -> list[list[Candidate]]:
        """`n` continuations of each prefix (token ids), in the prefixes' order.

        With a seed, prefix i is sampled with `sampling.seed + i * n` and its j-th sample with a
        further `+ j`, so that no two samples of a call share their randomness. At temperature 0 the `n`
        are one sample, repeated. A prefix that leaves
        no room for `sampling.max_tokens` is not cut: its list is empty, and it is counted in
        `stats()["refused"]`.
        """
        requests = []
        for index, prefix in enumerate(prefixes):
            seed = None if sampling.seed is None else sampling.seed + index * n
            requests.append((tuple(prefix), n, _reseeded(sampling, seed)))
        return await self.propose_many(requests)

    async def propose_many(self, requests: Sequence[Request]) -> list[list[Candidate]]:
        """The candidates of each (prefix, n, sampling), in the requests' order.

        For callers that gather small requests into one remote call. Prefixes that are too long get
        an empty list, as in `propose`.
        """
        return list(await asyncio.gather(*(self._sample(*request) for request in requests)))

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts, with no special tokens added."""
        if not texts:
            return []
        encoded = self._tokenizer()(list(texts), add_special_tokens=False)["input_ids"]
        return [tuple(ids) for ids in encoded]

    async def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Texts of token id sequences, special tokens included."""
        return [self._text(ids) for ids in sequences]

    async def reload(self, path: str, digest: str | None = None) -> str:
        """As `Engine.reload`; a checkpoint with another vocabulary is refused (ValueError) as well."""
        return await super().reload(path, digest)

    # ------------------------------------------------------------------ inside

    def _check_same_model(self, path: str) -> None:
        super()._check_same_model(path)
        from transformers import AutoTokenizer

        if AutoTokenizer.from_pretrained(path).get_vocab() != self._tokenizer().get_vocab():
            raise ValueError(
                f"reload of {path}: its vocabulary differs from that of {self.path}, so token ids would "
                "change their meaning; start a new engine for it"
            )

    def _extra_arguments(self) -> dict[str, Any]:
        # Before temperature and top-p: the policy's own probabilities.
        return {"logprobs_mode": "raw_logprobs"}

    async def _warm_up(self) -> None:
        configured = self._started().model_config.try_get_generation_config().get("eos_token_id") or []
        ends = [configured] if isinstance(configured, int) else configured
        self._end_tokens = frozenset([*ends, self._tokenizer().eos_token_id])
        prompt = (await self.encode(["1 + 1 = "]))[0]
        await self._sample(prompt, 2, Sampling(max_tokens=2, stop=("2",)))
        self._counts = dict.fromkeys(self._counts, 0.0)

    def _tokenizer(self) -> Any:
        return self._started().get_tokenizer()

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer().decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _single_token(self, text: str) -> int | None:
        """The id of a string that the tokenizer spells with one token, else None."""
        if text not in self._singles:
            ids = self._tokenizer().encode(text, add_special_tokens=False)
            self._singles[text] = ids[0] if len(ids) == 1 else None
        return self._singles[text]

    def _parameters(self, n: int, sampling: Sampling) -> Any:
        """vLLM's sampling parameters.

        A boundary that is one token ends a sample by its id, and no text is made while sampling
        (with text, a third fewer tokens a second were measured); others need vLLM to look at the text.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        single = {text: self._single_token(text) for text in sampling.stop}
        strings = [text for text, token in single.items() if token is None]
        return SamplingParams(
            n=n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop=strings or None,
            stop_token_ids=[token for token in single.values() if token is not None],
            include_stop_str_in_output=True,
            detokenize=bool(strings),
            skip_special_tokens=False,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _sample(self, prefix: tuple[int, ...], n: int, sampling: Sampling) -> list[Candidate]:
        if not prefix:
            raise ValueError("propose: an empty prefix; a prompt has at least one token")
        if len(prefix) + sampling.max_tokens > self.config.max_model_len:
            self._counts["refused"] += 1
            return []
        llm = self._started()
        # vLLM refuses several greedy samples; they would be the same.
        greedy = sampling.temperature == 0
        parameters = self._parameters(1 if greedy else n, sampling)
        prompt = {"prompt_token_ids": list(prefix)}
        output = await self._run(n, lambda: llm.generate(prompt, parameters, self._request_id()))
        self._counts["prompt_tokens"] += len(prefix)
        self._counts["generated_tokens"] += sum(len(sample.token_ids) for sample in output.outputs)
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        candidates = [self._candidate(sample, sampling.stop) for sample in samples]
        return candidates * n if greedy else candidates

    def _candidate(self, sample: Any, stop: tuple[str, ...]) -> Candidate:
        """A vLLM completion, cut after the token that completes a boundary, without an end token."""
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a sample with {sample.finish_reason!r}: its result is unusable")
        ids = list(sample.token_ids)
        text = self._text(ids)
        if any(boundary in text for boundary in stop):
            ids = self._through_boundary(ids, stop)
            text = self._text(ids)
            at_boundary = True
        else:
            at_boundary = False
            if ids and ids[-1] in self._end_tokens:
                ids.pop()
                text = self._text(ids)
        return Candidate(
            text=text,
            token_ids=tuple(ids),
            logprobs=tuple(sample.logprobs.logprobs[: len(ids)]),
            truncated=not at_boundary and sample.finish_reason == "length",
        )

    def _through_boundary(self, ids: list[int], stop: tuple[str, ...]) -> list[int]:
        """The shortest beginning of `ids` whose text holds a boundary; mostly all of them."""
        low, high = 1, len(ids)
        if not any(boundary in self._text(ids[:-1]) for boundary in stop):
            return ids
        while low < high:
            middle = (low + high) // 2
            if any(boundary in self._text(ids[:middle]) for boundary in stop):
                high = middle
            else:
                low = middle + 1
        return ids[:low]


def _reseeded(sampling: Sampling, seed: int | None) -> Sampling:
    return Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        stop=sampling.stop,
        seed=seed,
    )
