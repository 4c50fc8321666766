"""The process preference model (PPM): a better step must score higher than a worse one after the same prefix.

Loss of a node (rStar-Math, arXiv 2501.04519, after the Bradley-Terry model), over its pairs of weight w that
sum to 1:

    L = -Σ w · log σ(β · (s⁺ - s⁻))

plus, where the model started from a policy, an anchor to that policy (below).

A score s comes in two forms. `head`: a scalar head on the step's last token (rStar-Math). `logprob`: the
model's own summed log-probability of the step's sampled tokens given the prefix, kin to the implicit process
rewards of arXiv 2412.01981; it departs from rStar-Math, and is what works for models of a few million
parameters.

The anchor, for the `logprob` form: the pairs that a trained policy still ranks wrong are largely the wrongly labelled
ones, and following them costs the model what it knows. Each pair therefore adds

    w · anchor · mean over the tokens t of both sides of ½ (log p(t) - log p₀(t))²

with p₀ the model before training: the estimator k2 of a KL divergence (Schulman 2020, "Approximating KL
divergence").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evolve.learn.sft import supervised_logits
from evolve.schema import ScoreForm


class PPMObjective(nn.Module):
    """A PPM with its pairwise loss on packed tries (`evolve.learn.forest.PairBatch`).

    `model` is a causal language model (`logprob`) or a sequence classifier with one label (`head`).
    """

    def __init__(self, model: Any, form: ScoreForm, beta: float, anchor: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.beta = beta
        self.anchor = anchor

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attends: Tensor,
        rows: Tensor,
        columns: Tensor,
        targets: Tensor,
        owner: Tensor,
        end_rows: Tensor,
        end_columns: Tensor,
        positive: Tensor,
        negative: Tensor,
        weights: Tensor,
        reference: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum of the pairs' losses, how many pairs are ranked right, and the log-probability of each of
        the K `targets` (`logprob`; of no token for `head`)."""
        if self.form is ScoreForm.head:
            scores = self._head(input_ids, position_ids, attends, end_rows, end_columns)
            logprobs = scores.new_zeros(0)
        else:
            logprobs = self._logprobs(input_ids, position_ids, attends, rows, columns, targets)
            scores = logprobs.new_zeros(len(end_rows)).index_add(0, owner, logprobs)
        margin = scores[positive] - scores[negative]
        loss = (weights * nn.functional.softplus(-self.beta * margin)).sum()
        if self.anchor and self.form is ScoreForm.logprob:
            pair = owner // 2
            share = weights / torch.bincount(pair, minlength=len(weights)).clamp(min=1)
            loss = loss + self.anchor * (share[pair] * 0.5 * (logprobs - reference) ** 2).sum()
        return loss, (margin.detach() > 0).sum(), logprobs.detach()

    def _head(
        self, input_ids: Tensor, position_ids: Tensor, attends: Tensor, end_rows: Tensor, end_columns: Tensor
    ) -> Tensor:
        body = getattr(self.model, self.model.base_model_prefix)
        hidden = body(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attends, use_cache=False
        ).last_hidden_state
        return self.model.score(hidden[end_rows, end_columns]).squeeze(-1).float()

    def _logprobs(
        self, input_ids: Tensor, position_ids: Tensor, attends: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
    ) -> Tensor:
        # A token shared by several continuations is projected to the vocabulary once.
        places, at = torch.unique(rows * input_ids.shape[1] + columns, return_inverse=True)
        logits = supervised_logits(
            self.model,
            input_ids,
            position_ids,
            attends,
            places // input_ids.shape[1],
            places % input_ids.shape[1],
        )
        return logits.log_softmax(-1)[at, targets]
