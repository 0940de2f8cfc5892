"""Checks of a decode step's attention from the projection on, against the torch path; see attention_cases.py."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace

import torch
from torch import Tensor

from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.attention.projected import projected_attention
from pdray.kernels.attention.projected_decode_triton import DecodePlan, choose_plan, triton_projected_decode
from pdray.kernels.attention.rotary_store import HeadOperations

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

HEADS = [(9, 3, 64), (4, 2, 80), (2, 2, 96), (4, 1, 128), (40, 2, 16)]
LENGTHS = [1, 33, 17, 130]
TILES = [(64, 8, 3, 1), (32, 4, 2, 0), (16, 2, 2, 2), (32, 4, 3, 3)]


def batch(lengths: list[int], block_size: int) -> tuple[AttentionMetadata, int]:
    """A decode step of sequences of these lengths over shuffled blocks, block 0 left out; and the number of blocks."""
    needed = [-(-length // block_size) for length in lengths]
    num_blocks = sum(needed) + 2
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    tables = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
    last = torch.tensor(lengths) - 1
    blocks = tables[torch.arange(len(lengths)), last // block_size].long()
    return AttentionMetadata(
        slot_mapping=blocks * block_size + last % block_size,
        block_tables=tables,
        cu_seqlens_q=torch.arange(len(lengths) + 1, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        query_lens=[1] * len(lengths),
        kv_lens=lengths,
        num_decodes=len(lengths),
    ), num_blocks


def padded(meta: AttentionMetadata) -> AttentionMetadata:
    """On the device, with two rows more that hold no KV and write to the dummy block."""
    tables = torch.cat((meta.block_tables, meta.block_tables.new_zeros(2, meta.block_tables.shape[1])))
    return replace(
        meta,
        slot_mapping=torch.cat((meta.slot_mapping, torch.zeros(2, dtype=torch.int64))).to(DEVICE),
        block_tables=tables.to(DEVICE),
        cu_seqlens_q=torch.arange(len(meta.seq_lens) + 3, dtype=torch.int32).to(DEVICE),
        seq_lens=torch.cat((meta.seq_lens, meta.seq_lens.new_zeros(2))).to(DEVICE),
        query_lens=[],
        kv_lens=[],
        num_decodes=meta.num_decodes + 2,
    )


def to_device(heads: HeadOperations) -> HeadOperations:
    return HeadOperations(*(each.to(DEVICE) if isinstance(each, Tensor) else each for each in heads))


def check_projected(shape: tuple[int, int, int], dtype: torch.dtype, has_norm: bool, plan: DecodePlan) -> None:
    """Results, twice the same bits, stored KV and untouched cache; memory without a token is NaN."""
    num_heads, num_kv_heads, head_dim = shape
    block_size = 16 if num_heads % 2 else 32
    meta, num_blocks = batch(LENGTHS, block_size)
    qkv = torch.randn(len(LENGTHS) + 2, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    norms = [(torch.rand(head_dim) + 0.5).to(dtype) if has_norm else None for _ in range(2)]
    angles = torch.randn(max(LENGTHS), head_dim // 2)
    heads = HeadOperations(*norms, 1e-6, angles.cos(), angles.sin(), num_heads)
    positions = torch.tensor([*(length - 1 for length in LENGTHS), 0, 0])
    cache = torch.randn(num_blocks, 2, block_size, num_kv_heads, head_dim).to(dtype)
    wide = HeadOperations(*(each.float() if isinstance(each, Tensor) else each for each in heads))
    stored = cache.to(torch.float32, copy=True)
    scale = head_dim**-0.5
    expected = projected_attention(qkv[:-2].float(), wide, positions[:-2], stored, meta, scale)

    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for table, length in zip(meta.block_tables.tolist(), LENGTHS, strict=True):
        for position in range(length - 1):
            used[table[position // block_size], position % block_size] = True
    cache.transpose(1, 2)[~used] = float("nan")
    outs = []
    for _ in range(1 if INTERPRETED else 2):
        target = cache.to(DEVICE, copy=True)
        arguments = qkv.to(DEVICE), to_device(heads), positions.to(DEVICE), target, padded(meta), scale
        outs.append(triton_projected_decode(*arguments, plan).cpu())
    case = f"{shape}, {dtype}, norm {has_norm}, {plan}"
    assert outs[0].dtype == dtype and torch.equal(outs[0], outs[-1]), case
    assert not outs[0][-2:].any(), case
    tolerance = TOLERANCE[dtype]
    out = outs[0][:-2].float()
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {text}")
    tokens, kept = target.cpu().transpose(1, 2).flatten(0, 1), cache.transpose(1, 2).flatten(0, 1)
    slots = meta.slot_mapping
    reference = stored.transpose(1, 2).flatten(0, 1)[slots]
    torch.testing.assert_close(tokens[slots].float(), reference, rtol=tolerance, atol=tolerance)
    kept[slots], kept[0] = tokens[slots], tokens[0]
    assert torch.equal(tokens.nan_to_num(7.0), kept.nan_to_num(7.0)), case


def check_all_projected() -> None:
    for i, (shape, dtype) in enumerate(itertools.product(HEADS, DTYPES)):
        check_projected(shape, dtype, i % 3 != 0, DecodePlan((1, 2, 5)[i % 3], *TILES[i % 4]))


def check_plans() -> None:
    """Of 132 processors: two programs each, and no plan where none is faster."""
    assert choose_plan(16, 1024, 132, 2) == DecodePlan(4, 64, 8, 3, 1)
    assert choose_plan(16, 40_960, 132, 2) == DecodePlan(16, 64, 4, 3, 2)
    assert [choose_plan(n, 4096, 132, 2) for n in (64, 128, 192)] == [DecodePlan(s, 64, 4, 3, 2) for s in (4, 2, 2)]
    assert choose_plan(64, 16, 132, 4) == DecodePlan(1, 32, 4, 2, 1)
    assert [choose_plan(n, 4096, 132, 2) for n in (396, 512, 528)] == [DecodePlan(1, 32, 4, 3, 3)] * 3
    assert [choose_plan(n, 4096, 132, 2) for n in (8, 198, 395, 529, 2048)] == [None] * 5
    assert choose_plan(512, 4096, 132, 4) is None


CHECKS = {"projected decode": check_all_projected, "plans": check_plans}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
