"""Supervised fine-tuning (SFT): cross-entropy on the sampled tokens of trajectories."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SFTObjective(nn.Module):
    """A causal language model with its loss on packed rows (`evolve.learn.packing.TokenBatch`)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood of the supervised tokens (nats), and how many are predicted best.

        `attention_mask` stays unset: transformers then keeps attention within each run of rising position
        ids. A mask of ones would let sequences of one row see each other.
        """
        logits = supervised_logits(self.model, input_ids, position_ids, None, rows, columns)
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        return loss, (logits.detach().argmax(-1) == targets).sum()


def supervised_logits(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    attends: Tensor | None,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Logits, K × vocabulary in fp32, at the K places (`rows[k]`, `columns[k]`).

    Only the columns that some row needs pass through the vocabulary projection, which for a short
    completion after a long prompt is most of the memory.
    """
    kept = torch.unique(columns) if columns.numel() else columns.new_zeros(1)
    logits = model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attends,
        use_cache=False,
        logits_to_keep=kept,
    ).logits
    return logits[rows, torch.searchsorted(kept, columns)].float()
