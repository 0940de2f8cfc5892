"""rotate_and_store, embed and the draws on the CPU; their kernels are checked by fused_cases.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdray.kernels.attention.rotary import apply_rotary
from pdray.kernels.attention.rotary_store import rotate_and_store
from pdray.kernels.elementwise.embedding import embed
from pdray.kernels.elementwise.rms_norm import rms_norm
from pdray.kernels.kv.blocks import store_kv
from pdray.kernels.sampling.draw import draw
from pdray.kernels.sampling.draw_rows import draw_late, draw_tokens
from pdray.kernels.sampling.history import no_history
from pdray.kernels.sampling.metadata import RandomRows
from pdray.kernels.sampling.rows import RECORD, WORDS, DrawTable, RowFlag
from pdray.kernels.sampling.sample import SamplingMetadata, SamplingRow, sample
from pdray.sampling_params import SamplingParams


@pytest.mark.parametrize("has_norm", [False, True])
def test_rotate_and_store_is_its_parts(has_norm: bool) -> None:
    qkv, kv = torch.randn(7, 8 * 16), torch.zeros(3, 2, 16, 2, 16)
    norms = [torch.rand(16) if has_norm else None for _ in range(2)]
    angles, positions, slots = torch.randn(30, 8), torch.randint(30, (7,)), torch.randperm(48)[:7]
    heads, expected = qkv.view(7, 8, 16), kv.clone()
    cos, sin = angles.cos()[positions], angles.sin()[positions]
    q, k = (
        apply_rotary(part if norm is None else rms_norm(part, norm, 1e-5), cos, sin)
        for part, norm in zip((heads[:, :4], heads[:, 4:6]), norms, strict=True)
    )
    store_kv(k, heads[:, 6:], expected, slots)
    out = rotate_and_store(qkv, *norms, 1e-5, angles.cos(), angles.sin(), positions, kv, slots, 4)
    assert torch.equal(out.q, q) and torch.equal(out.k, k) and torch.equal(out.v, heads[:, 6:])
    assert torch.equal(kv, expected)


def test_embed_takes_late_tokens() -> None:
    table, sampled = torch.randn(9, 4), torch.tensor([8, 5])
    assert torch.equal(embed(torch.tensor([2, -1, -2, 0]), table, sampled), table[[2, 8, 5, 0]])
    assert torch.equal(embed(torch.tensor([2, 7]), table, sampled[:0]), table[[2, 7]])


def test_draws_of_greedy_and_random_rows() -> None:
    """Rows at temperature 0 take the argmax and read no filter; the others draw as alone."""
    logits = torch.randn(6, 200)
    temperature = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 1.0])
    seeds, positions, top_k = torch.arange(6), torch.arange(6) + 3, torch.tensor([3, 0, 1, 0, 7, 0])
    for limit in (None, top_k):
        out = torch.full((6,), -7)
        records = np.zeros(6, RECORD)
        records["temperature"], records["seed"], records["position"] = temperature, seeds, positions
        records["top_p"] = 1.0
        if limit is not None:
            records["top_k"], records["flags"][::2] = limit, RowFlag.LATE
        words = torch.from_numpy(records.view(np.int32).reshape(-1, WORDS))
        table = DrawTable(words, no_history(1, 200), torch.zeros(1, 7, dtype=torch.int32))
        draw_tokens(logits, table, out)
        assert (out == -7).tolist() == [limit is not None and i % 2 == 0 for i in range(6)]
        draw_late(logits, table, out)
        for i in range(6):
            row = slice(i, i + 1)
            k = None if limit is None else limit[row]
            random = RandomRows(torch.tensor([0]), temperature[row], seeds[row], positions[row], None, k, None)
            expected = logits[i].argmax() if temperature[i] == 0 else draw(logits[row], random)[0]
            assert out[i] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sample_takes_the_models_dtype(dtype: torch.dtype) -> None:
    """As if the logits had been widened first, with penalties and log-probabilities too; and leaves them unchanged."""
    logits = torch.randn(4, 300).to(dtype)
    kept = logits.clone()
    params = [
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(),
        SamplingParams(top_p=0.8, presence_penalty=0.7),
        SamplingParams(top_k=4, logprobs=3),
    ]
    meta = SamplingMetadata.build([SamplingRow(p, i, i, (1, 2), (3, 4), (5,)) for i, p in enumerate(params)])
    out, expected = sample(logits, meta), sample(logits.float(), meta)
    assert torch.equal(out.token_ids, expected.token_ids)
    assert out.logprobs is not None and expected.logprobs is not None
    assert all(torch.equal(a, b) for a, b in zip(out.logprobs, expected.logprobs, strict=True))
    assert torch.equal(logits, kept)
