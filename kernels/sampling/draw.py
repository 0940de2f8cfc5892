"""The seeded draw: temperature, min_p, top_k, top_p, then Gumbel-max. The reference of all kernels that draw.

The draw is ``argmax(logits / T + Gumbel)`` with Gumbel noise from Philox (Gumbel 1954; Maddison et al. 2014, "A*
Sampling"), so it is a pure function of the logits, the parameters, the seed and the position. Ties go to the lowest id.

Whatever the numbers are, a row draws an id of the vocabulary, and other rows draw what they would without it. NaN and
what is below -2**99 count as -inf, what is above 2**99 as 2**99; temperatures are kept between 1e-7 and 1e7, so that no
quotient overflows. A filter keeps at least the most likely token; one whose parameter is NaN is off, and a temperature
that is NaN is greedy. A row of nothing but -inf draws id 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdray.kernels.sampling.metadata import RandomRows
from pdray.kernels.sampling.philox import philox_uniform, philox_uniform_at

FIRST_CANDIDATES = 256
LARGEST_LOGIT = 2.0**99  # a power of two, which bfloat16 has too
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-7, 1e7


def draw(logits: Tensor, random: RandomRows) -> Tensor:
    """One token id [R] int64 for each of the R rows of [R, V] float32 logits."""
    scaled = clean_logits(logits) / random.temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)[:, None]
    if random.min_p is not None:
        margin = torch.where(random.min_p > 0, random.min_p.clamp(max=1.0).log(), float("-inf"))
        threshold = scaled.max(-1, keepdim=True).values + margin[:, None]
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


def clean_logits(logits: Tensor) -> Tensor:
    """A copy in which NaN counts as -inf, and nothing is infinite but that; see the module."""
    largest = min(LARGEST_LOGIT, torch.finfo(logits.dtype).max)
    return torch.where(logits > -LARGEST_LOGIT, logits, float("-inf")).clamp_(max=largest)


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

    The token that crosses top_p belongs to the set, so that it is never empty; among equals, the lowest ids do.
    top_p >= 1: all stay.
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
        num_kept = (mass_before < top_p[:, None]).sum(-1).clamp_(min=1)
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
