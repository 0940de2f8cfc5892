"""Choosing the next token of each row: penalties, masks, temperature, filters, and a seeded draw.

Order: bias, penalties, banned ids, masks, (greedy rows: argmax), and draw.py: temperature, min_p, top_k, top_p,
Gumbel-max.

Every operation works within a row, so that a row's result does not depend on the rest of the batch, and each
group of parameters holds only the rows that need it: a batch of greedy rows costs one argmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pdray.kernels.sampling.draw import clean_logits, draw, keep_top_k, keep_top_p
from pdray.kernels.sampling.history import COUNT, PROMPT
from pdray.kernels.sampling.mask import apply_masks
from pdray.kernels.sampling.metadata import (
    BannedTokens,
    BiasedTokens,
    LogprobRows,
    PenaltyRows,
    RandomRows,
    SamplingMetadata,
    SamplingRow,
)

__all__ = [
    "Logprobs",
    "RandomRows",
    "SampleOutput",
    "SamplingMetadata",
    "SamplingRow",
    "draw",
    "keep_top_k",
    "keep_top_p",
    "sample",
]


class Logprobs(NamedTuple):
    """Log-probabilities under the raw logits of the R rows that asked, in the order of ``rows``.

    Attributes:
        rows: [R] int64, batch rows.
        sampled: [R] float32. sampled_rank: [R] int64, 1 + number of strictly larger logits.
        top_token_ids: [R, K] int64, most likely first, ties by lowest id; K is the largest number asked for.
        top_logprobs: [R, K] float32.
    """

    rows: Tensor
    sampled: Tensor
    sampled_rank: Tensor
    top_token_ids: Tensor
    top_logprobs: Tensor


class SampleOutput(NamedTuple):
    """token_ids: [B] int64. logprobs: None if no row asked."""

    token_ids: Tensor
    logprobs: Logprobs | None


def sample(logits: Tensor, meta: SamplingMetadata) -> SampleOutput:
    """Choose one token for each row, of the vocabulary whatever the logits are: see draw.py for NaN and infinities.

    Args:
        logits: [B, V], any float dtype; unchanged on return.
    """
    raw_logits = logits.float()
    changes = meta.bias, meta.penalties, meta.banned, meta.masks
    logits = raw_logits if all(part is None for part in changes) else raw_logits.clone()
    if meta.bias is not None:
        add_bias(logits, meta.bias)
    if meta.penalties is not None:
        apply_penalties(logits, meta.penalties)
    if meta.banned is not None:
        ban_tokens(logits, meta.banned)
    if meta.masks is not None:
        apply_masks(logits, meta.masks)
    logits = clean_logits(logits)
    token_ids = logits.argmax(-1)
    if meta.random is not None:
        token_ids[meta.random.rows] = draw(logits[meta.random.rows], meta.random)
    logprobs = None if meta.logprobs is None else compute_logprobs(raw_logits, token_ids, meta.logprobs)
    return SampleOutput(token_ids, logprobs)


def apply_penalties(logits: Tensor, penalties: PenaltyRows) -> None:
    """In place on [B, V]: repetition over prompt and output, frequency and presence over output only."""
    selected = logits[penalties.rows]
    words = pad(penalties.history, (0, selected.shape[1] - penalties.history.shape[1]))
    counts = (words & COUNT).float()
    seen = (words & (PROMPT | COUNT)) != 0
    repetition = penalties.repetition[:, None]
    penalized = torch.where(selected > 0, selected / repetition, selected * repetition)
    selected = torch.where(seen, penalized, selected)
    selected -= penalties.frequency[:, None] * counts
    selected -= penalties.presence[:, None] * (counts > 0)
    logits[penalties.rows] = selected


def add_bias(logits: Tensor, bias: BiasedTokens) -> None:
    """In place on [B, V]: to each (row, token id)."""
    logits.index_put_((bias.rows, bias.token_ids), bias.values, accumulate=True)


def ban_tokens(logits: Tensor, banned: BannedTokens) -> None:
    """In place on [B, V]: -inf at each (row, token id)."""
    logits.index_put_((banned.rows, banned.token_ids), logits.new_full((), float("-inf")))


def compute_logprobs(logits: Tensor, token_ids: Tensor, asked: LogprobRows) -> Logprobs:
    """Log-probabilities of the sampled and of the most likely tokens, under raw logits [B, V].

    A row of nothing but NaN and -inf knows no probabilities: they are -inf.
    """
    rows = asked.rows
    selected = clean_logits(logits[rows].float())
    sampled = token_ids[rows, None]
    logprobs = selected.log_softmax(-1)
    logprobs = torch.where(logprobs.isnan(), float("-inf"), logprobs)
    rank = (selected > selected.gather(1, sampled)).sum(-1) + 1
    top_token_ids = _top_token_ids(selected, min(asked.num_logprobs, selected.shape[1]))
    return Logprobs(rows, logprobs.gather(1, sampled)[:, 0], rank, top_token_ids, logprobs.gather(1, top_token_ids))


def _top_token_ids(logits: Tensor, k: int) -> Tensor:
    """[R, k] ids in the order (logit descending, id ascending), which topk alone leaves open among equals."""
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0.0 equal to 0.0
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    vocab_size = logits.shape[1]
    reversed_id = torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    keys = (ordered << 32) + reversed_id
    return vocab_size - 1 - (keys.topk(k, -1).values & 0xFFFFFFFF)
