"""paged_attention against a naive float64 loop, and the bitwise invariance that its docstring claims."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pdray.kernels.attention.paged import AttentionMetadata, paged_attention


class Sequence(NamedTuple):
    """One sequence's queries [query_len, Hq, d] and all of its keys and values [kv_len, Hkv, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


def random_sequence(query_len: int, kv_len: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Sequence:
    return Sequence(
        torch.randn(query_len, num_heads, head_dim),
        torch.randn(kv_len, num_kv_heads, head_dim),
        torch.randn(kv_len, num_kv_heads, head_dim),
    )


def run(sequences: list[Sequence], block_size: int, seed: int = 0, fill: float = 0.0) -> list[Tensor]:
    """Scatter the sequences over randomly chosen blocks of a pool and attend to them in one call."""
    rng = random.Random(seed)
    num_kv_heads, head_dim = sequences[0].k.shape[1:]
    needed = [-(-len(s.k) // block_size) for s in sequences]
    num_blocks = sum(needed) + 5
    free = rng.sample(range(1, num_blocks), num_blocks - 1)
    kv_layer = torch.full((num_blocks, 2, block_size, num_kv_heads, head_dim), fill)
    tables = torch.full((len(sequences), max(needed) + 1), 0, dtype=torch.int32)
    slots = []
    for i, sequence in enumerate(sequences):
        blocks = [free.pop() for _ in range(needed[i])]
        tables[i, : len(blocks)] = torch.tensor(blocks)
        for position in range(len(sequence.k)):
            block, offset = blocks[position // block_size], position % block_size
            kv_layer[block, 0, offset] = sequence.k[position]
            kv_layer[block, 1, offset] = sequence.v[position]
            if position >= len(sequence.k) - len(sequence.q):
                slots.append(block * block_size + offset)
    query_lens = [len(s.q) for s in sequences]
    kv_lens = [len(s.k) for s in sequences]
    meta = AttentionMetadata(
        slot_mapping=torch.tensor(slots),
        block_tables=tables,
        cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        seq_lens=torch.tensor(kv_lens, dtype=torch.int32),
        query_lens=query_lens,
        kv_lens=kv_lens,
    )
    q = torch.cat([s.q for s in sequences])
    out = paged_attention(q, kv_layer, meta, head_dim**-0.5)
    assert out.shape == q.shape
    return list(out.split(query_lens))


def naive_attention(sequence: Sequence) -> Tensor:
    q, k, v = (t.to(torch.float64) for t in sequence)
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for i in range(len(q)):
        visible = len(k) - len(q) + i + 1
        for head in range(q.shape[1]):
            scores = k[:visible, head // group] @ q[i, head] / math.sqrt(q.shape[2])
            out[i, head] = scores.softmax(0) @ v[:visible, head // group]
    return out


def cut(sequence: Sequence, start: int, end: int) -> Sequence:
    """The chunk of a whole prompt (query_len == kv_len) that computes positions start..end."""
    return Sequence(sequence.q[start:end], sequence.k[:end], sequence.v[:end])


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


HEADS = [(9, 3, 64), (4, 4, 16), (8, 1, 32), (4, 2, 80), (6, 2, 96), (8, 2, 128)]


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_equals_a_naive_loop(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    torch.manual_seed(num_heads * head_dim + block_size)
    lengths = [(1, 1), (1, 65), (17, 17), (5, 90), (1, 130), (40, 300), (70, 70), (1, 2), (1, 16), (2, 257)]
    sequences = [random_sequence(q, kv, num_heads, num_kv_heads, head_dim) for q, kv in lengths]
    for sequence, out in zip(sequences, run(sequences, block_size), strict=True):
        torch.testing.assert_close(out.to(torch.float64), naive_attention(sequence), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_equals_a_naive_loop_on_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_kv_heads = rng.choice([1, 2, 3])
    num_heads = num_kv_heads * rng.choice([1, 2, 3, 5])
    head_dim = rng.choice([16, 24, 64])
    sequences = []
    for _ in range(rng.randint(1, 6)):
        kv_len = rng.randint(1, 400)
        query_len = rng.choice([1, kv_len, rng.randint(1, kv_len)])
        sequences.append(random_sequence(min(query_len, 120), kv_len, num_heads, num_kv_heads, head_dim))
    for sequence, out in zip(sequences, run(sequences, rng.choice([16, 32]), seed), strict=True):
        torch.testing.assert_close(out.to(torch.float64), naive_attention(sequence), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    kv_layer = torch.randn(5, 2, 16, 2, 32).to(dtype)
    q = torch.randn(21, 4, 32).to(dtype)
    meta = AttentionMetadata(
        slot_mapping=torch.zeros(21, dtype=torch.int64),
        block_tables=torch.tensor([[2, 4], [3, 1]], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 20, 21], dtype=torch.int32),
        seq_lens=torch.tensor([30, 18], dtype=torch.int32),
        query_lens=[20, 1],
        kv_lens=[30, 18],
    )
    out = paged_attention(q, kv_layer, meta, 32**-0.5)
    assert out.dtype == dtype
    expected = paged_attention(q.float(), kv_layer.float(), meta, 32**-0.5)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_a_row_does_not_depend_on_the_batch(num_heads: int, num_kv_heads: int, head_dim: int, num_threads: int) -> None:
    torch.manual_seed(head_dim)
    lengths = [(1, 1), (1, 65), (17, 17), (5, 90), (1, 130), (140, 300), (1, 70), (1, 2), (1, 700), (2, 257), (1, 600)]
    sequences = [random_sequence(q, kv, num_heads, num_kv_heads, head_dim) for q, kv in lengths]
    together = run(sequences, 16)
    backwards = run(sequences[::-1], 32, seed=3)[::-1]
    for i, sequence in enumerate(sequences):
        alone = run([sequence], 16, seed=i)[0]
        assert torch.equal(alone, together[i]), f"sequence {i} of {lengths}"
        assert torch.equal(alone, backwards[i]), f"sequence {i} of {lengths}"


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_a_row_does_not_depend_on_chunking(num_heads: int, num_kv_heads: int, head_dim: int, num_threads: int) -> None:
    torch.manual_seed(head_dim + 1)
    length = 590
    prompt = random_sequence(length, length, num_heads, num_kv_heads, head_dim)
    whole = run([prompt], 16)[0]
    for cuts in ([0, 1, 2, 3, 66, 200, 590], [0, 37, 255, 256, 257, 300, 512, 590], list(range(0, 591, 59))):
        for start, end in zip(cuts, cuts[1:], strict=False):
            chunk = run([cut(prompt, start, end)], 16)[0]
            assert torch.equal(chunk, whole[start:end]), f"positions {start}..{end}"


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_a_decode_step_equals_a_prefill_of_the_same_tokens(
    num_heads: int, num_kv_heads: int, head_dim: int, num_threads: int
) -> None:
    torch.manual_seed(head_dim + 2)
    length = 530
    prompt = random_sequence(length, length, num_heads, num_kv_heads, head_dim)
    whole = run([prompt], 16)[0]
    positions = [0, 1, 5, 63, 64, 65, 127, 128, 200, 255, 256, 400, 511, 512, 529]
    steps = run([cut(prompt, position, position + 1) for position in positions], 16)
    for position, step in zip(positions, steps, strict=True):
        assert torch.equal(step[0], whole[position]), f"position {position}"


def test_threads_do_not_change_the_result() -> None:
    torch.manual_seed(5)
    sequences = [random_sequence(q, kv, 9, 3, 64) for q, kv in [(300, 300), (1, 700), (1, 20), (33, 64)]]
    before = torch.get_num_threads()
    outs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outs.append(run(sequences, 16))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_nothing_past_a_sequence_is_read() -> None:
    """Other blocks, the dummy block and the rest of the last block may hold NaN."""
    torch.manual_seed(6)
    sequences = [random_sequence(q, kv, 4, 2, 32) for q, kv in [(20, 20), (1, 33), (3, 70)]]
    clean = run(sequences, 16)
    dirty = run(sequences, 16, fill=float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_rows_past_the_last_sequence_are_zero() -> None:
    meta = AttentionMetadata(
        slot_mapping=torch.zeros(4, dtype=torch.int64),
        block_tables=torch.tensor([[1]], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 2], dtype=torch.int32),
        seq_lens=torch.tensor([2], dtype=torch.int32),
        query_lens=[2],
        kv_lens=[2],
    )
    out = paged_attention(torch.ones(4, 2, 16), torch.ones(2, 2, 16, 1, 16), meta, 0.25)
    assert torch.equal(out, torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None, None].expand(4, 2, 16))
