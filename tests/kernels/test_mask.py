"""Token masks and biases on the CPU; sampling_cases.py checks that the kernels do the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pdray.kernels.sampling.history import BIASES, END, PROMPT, Join, biased_tokens, no_history, pack_joins, remember
from pdray.kernels.sampling.mask import TokenMasks, apply_masks, unpack_masks
from pdray.kernels.sampling.sample import SamplingMetadata, SamplingRow, sample
from pdray.sampling_params import SamplingParams


def pack(allowed: torch.Tensor) -> torch.Tensor:
    """Words of [R, V] bool, bit by bit."""
    num_rows, vocab_size = allowed.shape
    words = [[0] * (-(-vocab_size // 32)) for _ in range(num_rows)]
    for row, token_id in allowed.nonzero().tolist():
        words[row][token_id // 32] |= 1 << token_id % 32
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 199])
def test_bits_stand_for_tokens(vocab_size: int) -> None:
    allowed = torch.rand(3, vocab_size) < 0.5
    assert torch.equal(unpack_masks(pack(allowed), vocab_size), allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_allowed_becomes_minus_infinity(dtype: torch.dtype) -> None:
    logits, allowed = torch.randn(5, 70).to(dtype), torch.rand(2, 70) < 0.3
    expected = logits.clone()
    expected[3][~allowed[0]] = expected[1][~allowed[1]] = float("-inf")
    apply_masks(logits, TokenMasks(torch.tensor([3, 1]), pack(allowed)))
    assert torch.equal(logits, expected)


def test_masks_come_before_everything_and_logprobs_do_not_see_them() -> None:
    logits = torch.randn(3, 64)
    allowed = torch.zeros(1, 64, dtype=torch.bool)
    allowed[0, [7, 9]] = True
    params = SamplingParams(temperature=1.0, top_k=5, top_p=0.5, repetition_penalty=1.5, logprobs=2, seed=0)
    rows = [SamplingRow(params, 4, position, [7], [9]) for position in range(3)]
    plain = SamplingMetadata.build(rows)
    masked = replace(plain, masks=TokenMasks(torch.tensor([1]), pack(allowed)))
    before = logits.clone()
    free, bound = sample(logits, plain), sample(logits, masked)
    assert torch.equal(logits, before) and int(bound.token_ids[1]) in (7, 9)
    assert bound.token_ids[[0, 2]].tolist() == free.token_ids[[0, 2]].tolist()
    assert bound.logprobs is not None and free.logprobs is not None
    assert torch.equal(bound.logprobs.top_logprobs, free.logprobs.top_logprobs)


def test_a_bias_is_added_before_everything_else() -> None:
    logits = torch.randn(2, 40)
    params = SamplingParams(temperature=0, repetition_penalty=2.0, logit_bias={3: 50.0, 4: -100.0}, logprobs=1)
    rows = [SamplingRow(params, 0, 0, [3], []), SamplingRow(SamplingParams(temperature=0), 0, 0)]
    out = sample(logits, SamplingMetadata.build(rows))
    assert out.token_ids.tolist() == [3, int(logits[1].argmax())] and out.logprobs is not None
    assert float(out.logprobs.sampled[0]) == pytest.approx(float(logits[0].log_softmax(-1)[3]), abs=1e-5)


def test_a_slot_keeps_biases_beside_what_it_counts() -> None:
    """As many different numbers as there is room for, on tokens that are prompt, output and end as well."""
    bias = {3 * i: (i - 500) / 8 for i in range(BIASES - 1)} | {1: -100.0}
    del bias[0]
    history = no_history(2, 3100)
    remember(history, pack_joins([Join(1, [3, 4], [3, 3, 6], [6, 7], bias)]))
    token_ids, values = biased_tokens(history[1].numpy())
    assert dict(zip(token_ids.tolist(), values.tolist(), strict=True)) == bias
    counts = history[1, BIASES:].numpy()
    assert [int(counts[i]) & (PROMPT - 1) & ((1 << 20) - 1) for i in (3, 4, 6, 7)] == [2, 0, 1, 0]
    assert np.flatnonzero(counts & PROMPT).tolist() == [3, 4] and np.flatnonzero(counts & END).tolist() == [6, 7]
    assert not bool(history[0].any())


def test_more_different_biases_than_a_slot_has_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="1024 different numbers"):
        pack_joins([Join(0, [], [], [], {i: float(i) for i in range(BIASES)})])
