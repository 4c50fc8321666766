"""The process preference model (PPM): a better step must score higher than a worse one after the same prefix.

Loss of a node (rStar-Math, arXiv 2501.04519, after the Bradley-Terry model), over its pairs of weight w that
sum to 1:

    L = -Σ w · log σ(β · (s⁺ - s⁻))

A score s comes in two forms. `head`: a scalar head on the step's last token (rStar-Math). `logprob`: the
model's own summed log-probability of the step's sampled tokens given the prefix, kin to the implicit process
rewards of arXiv 2412.01981; it departs from rStar-Math, and is what works for models of a few million
parameters.
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

    def __init__(self, model: Any, form: ScoreForm, beta: float) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.beta = beta

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
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the pairs' losses, and how many pairs are ranked right."""
        if self.form is ScoreForm.head:
            scores = self._head(input_ids, position_ids, attends, end_rows, end_columns)
        else:
            scores = self._logprob(input_ids, position_ids, attends, rows, columns, targets, owner, len(end_rows))
        margin = scores[positive] - scores[negative]
        loss = (weights * nn.functional.softplus(-self.beta * margin)).sum()
        return loss, (margin.detach() > 0).sum()

    def _head(
        self, input_ids: Tensor, position_ids: Tensor, attends: Tensor, end_rows: Tensor, end_columns: Tensor
    ) -> Tensor:
        body = getattr(self.model, self.model.base_model_prefix)
        hidden = body(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attends, use_cache=False
        ).last_hidden_state
        return self.model.score(hidden[end_rows, end_columns]).squeeze(-1).float()

    def _logprob(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attends: Tensor,
        rows: Tensor,
        columns: Tensor,
        targets: Tensor,
        owner: Tensor,
        continuations: int,
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
        logprobs = logits.log_softmax(-1)[at, targets]
        return logprobs.new_zeros(continuations).index_add(0, owner, logprobs)
