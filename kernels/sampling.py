"""Choosing the next token of each row: penalties, masks, temperature, filters, and a seeded draw.

Order: penalties, banned ids, (greedy rows: argmax), temperature, min_p, top_k, top_p, Gumbel-max. The draw is
``argmax(logits / T + Gumbel)`` with Gumbel noise from Philox (Gumbel 1954; Maddison et al. 2014, "A* Sampling"), so
it is a pure function of the logits, the parameters, the seed and the position. Ties go to the lowest id.

Every operation works within a row, so that a row's result does not depend on the rest of the batch, and each
group of parameters holds only the rows that need it: a batch of greedy rows costs one argmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdray.kernels.philox import philox_uniform, philox_uniform_at
from pdray.kernels.sampling_metadata import (
    BannedTokens,
    LogprobRows,
    PenaltyRows,
    RandomRows,
    SamplingMetadata,
    SamplingRow,
)

__all__ = ["Logprobs", "SampleOutput", "SamplingMetadata", "SamplingRow", "sample"]

FIRST_CANDIDATES = 256


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
    """Choose one token for each row.

    Args:
        logits: [B, V] float32, unchanged on return.
    """
    raw_logits = logits
    if meta.penalties is not None or meta.banned is not None:
        logits = logits.clone()
    if meta.penalties is not None:
        apply_penalties(logits, meta.penalties)
    if meta.banned is not None:
        ban_tokens(logits, meta.banned)
    if meta.random is None:
        token_ids = logits.argmax(-1)
    elif len(meta.random.rows) == len(logits):
        token_ids = draw(logits[meta.random.rows], meta.random)
    else:
        token_ids = logits.argmax(-1)
        token_ids[meta.random.rows] = draw(logits[meta.random.rows], meta.random)
    logprobs = None if meta.logprobs is None else compute_logprobs(raw_logits, token_ids, meta.logprobs)
    return SampleOutput(token_ids, logprobs)


def apply_penalties(logits: Tensor, penalties: PenaltyRows) -> None:
    """In place on [B, V]: repetition over prompt and output, frequency and presence over output only."""
    selected = logits[penalties.rows]
    num_rows, vocab_size = selected.shape
    counts = _count(penalties.output_token_ids, num_rows, vocab_size)
    seen = (_count(penalties.prompt_token_ids, num_rows, vocab_size) > 0) | (counts > 0)
    repetition = penalties.repetition[:, None]
    penalized = torch.where(selected > 0, selected / repetition, selected * repetition)
    selected = torch.where(seen, penalized, selected)
    selected -= penalties.frequency[:, None] * counts
    selected -= penalties.presence[:, None] * (counts > 0)
    logits[penalties.rows] = selected


def ban_tokens(logits: Tensor, banned: BannedTokens) -> None:
    """In place on [B, V]: -inf at each (row, token id)."""
    logits[banned.rows, banned.token_ids] = float("-inf")


def draw(logits: Tensor, random: RandomRows) -> Tensor:
    """One token id [R] int64 for each of the R rows of [R, V] logits."""
    scaled = logits / random.temperature[:, None]
    if random.min_p is not None:
        threshold = scaled.max(-1, keepdim=True).values + random.min_p.log()[:, None]
        scaled = scaled.masked_fill(scaled < threshold, float("-inf"))
    if random.top_k is not None:
        scaled = keep_top_k(scaled, random.top_k)
    if random.top_p is not None:
        scaled = keep_top_p(scaled, random.top_p)
    if random.min_p is None and random.top_k is None and random.top_p is None:
        return (scaled + gumbel(philox_uniform(random.seeds, random.positions, scaled.shape[1]))).argmax(-1)
    rows, token_ids = (scaled > float("-inf")).nonzero(as_tuple=True)
    uniform = philox_uniform_at(random.seeds[rows], random.positions[rows], token_ids)
    scores = torch.full_like(scaled, float("-inf"))
    scores[rows, token_ids] = scaled[rows, token_ids] + gumbel(uniform)
    return scores.argmax(-1)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise; overwrites its argument. The large values come from small, finely spaced numbers."""
    return uniform.neg_().log1p_().neg_().log_().neg_()


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """-inf below the top_k-th largest of each row of [R, V]; equals of that one stay. top_k < 1: all stay."""
    vocab_size = logits.shape[1]
    active = (top_k > 0) & (top_k < vocab_size)
    largest = torch.where(active, top_k, 1)
    values = logits.topk(int(largest.max()), -1).values
    threshold = values.gather(1, largest[:, None] - 1)
    return logits.masked_fill((logits < threshold) & active[:, None], float("-inf"))


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the smallest set of most likely tokens whose probabilities reach top_p.

    The token that crosses top_p belongs to the set; among equals, the lowest ids do. top_p >= 1: all stay.
    The sorted prefix that is looked at grows until it decides every row; its length changes no result.
    """
    vocab_size = logits.shape[1]
    active = top_p < 1
    probs = logits.softmax(-1)
    num_candidates = min(FIRST_CANDIDATES, vocab_size)
    while True:
        values, token_ids = logits.topk(num_candidates, -1)
        sorted_probs = probs.gather(1, token_ids).to(torch.float64)
        mass_before = sorted_probs.cumsum(-1) - sorted_probs
        num_kept = (mass_before < top_p[:, None]).sum(-1)
        undecided = active & (num_kept == num_candidates) & (values[:, -1] > float("-inf"))
        if num_candidates == vocab_size or not bool(undecided.any()):
            break
        num_candidates = min(num_candidates * 16, vocab_size)
    threshold = values.gather(1, num_kept[:, None] - 1).masked_fill_(~active[:, None], float("-inf"))
    kept = logits >= threshold
    has_surplus = (kept.sum(-1) > num_kept) & (threshold[:, 0] > float("-inf"))
    if bool(has_surplus.any()):
        equal = logits == threshold
        num_equal_kept = num_kept - (values > threshold).sum(-1)
        kept &= ~(equal & (equal.cumsum(-1) > num_equal_kept[:, None]) & has_surplus[:, None])
    return logits.masked_fill(~kept, float("-inf"))


def compute_logprobs(logits: Tensor, token_ids: Tensor, asked: LogprobRows) -> Logprobs:
    """Log-probabilities of the sampled and of the most likely tokens, under raw logits [B, V]."""
    rows = asked.rows
    selected = logits[rows]
    sampled = token_ids[rows, None]
    logprobs = selected.log_softmax(-1)
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


def _count(token_ids: Tensor, num_rows: int, vocab_size: int) -> Tensor:
    """How often each id occurs in each row of [R, N] padded with -1: [R, V] float32."""
    counts = torch.zeros(num_rows, vocab_size + 1, device=token_ids.device)
    padded = torch.where(token_ids < 0, vocab_size, token_ids)
    counts.scatter_add_(1, padded, torch.ones_like(padded, dtype=torch.float32))
    return counts[:, :vocab_size]
