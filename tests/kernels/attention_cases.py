"""Checks of attention, norms and block copies on small shapes; test_triton.py runs them in a process of their own.

Usable alone: ``TRITON_INTERPRET=1 python tests/kernels/attention_cases.py`` (interpreter, CPU), or without the variable
on a machine with a GPU. The references are the torch paths, which test_attention.py and test_kv_store.py prove.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pdray.kernels.attention.decode_triton import choose_num_splits
from pdray.kernels.attention.flash import first_flash_sequence, gathered_starts, is_available, is_worth_gathering
from pdray.kernels.attention.gather_triton import triton_gather_kv
from pdray.kernels.attention.paged import AttentionMetadata, FreshSplit, find_fresh, torch_paged_attention
from pdray.kernels.attention.paged_triton import triton_paged_attention
from pdray.kernels.attention.prefill_triton import launch_prefill
from pdray.kernels.elementwise.rms_norm import rms_norm
from pdray.kernels.elementwise.rms_norm_triton import triton_rms_norm
from pdray.kernels.kv.blocks_triton import copy_pieces, triton_gather_blocks, triton_scatter_blocks
from pdray.kernels.kv.pack import HeadRange, PackedBlocks, pack_blocks, unpack_blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def batch(lengths: list[tuple[int, int]], block_size: int, num_extra: int = 3) -> tuple[AttentionMetadata, int]:
    """Metadata for (query_len, kv_len) pairs over shuffled blocks, and the number of blocks."""
    num_decodes = next((i for i, (q, _) in enumerate(lengths) if q > 1), len(lengths))
    query_lens, kv_lens = [q for q, _ in lengths], [kv for _, kv in lengths]
    needed = [-(-kv // block_size) for kv in kv_lens]
    num_blocks = sum(needed) + num_extra
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    tables = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
    for i, count in enumerate(needed):
        tables[i, :count] = torch.tensor([free.pop() for _ in range(count)])
    return AttentionMetadata(
        slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64),
        block_tables=tables,
        cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        seq_lens=torch.tensor(kv_lens, dtype=torch.int32),
        query_lens=query_lens,
        kv_lens=kv_lens,
        num_decodes=num_decodes,
    ), num_blocks


def to_device(meta: AttentionMetadata) -> AttentionMetadata:
    """With two sequences more that have no tokens, as padding has: decodes if all are, else prompts."""
    starts, num_rows = meta.cu_seqlens_q, int(meta.cu_seqlens_q[-1])
    only_decodes = meta.num_decodes == len(meta.seq_lens)
    more = torch.tensor([1, 2] if only_decodes else [0, 0], dtype=torch.int32)
    tensors = (
        torch.cat((meta.slot_mapping, meta.slot_mapping.new_zeros(2))),
        torch.cat((meta.block_tables, meta.block_tables.new_zeros(2, meta.block_tables.shape[1]))),
        torch.cat((starts, num_rows + more)),
        torch.cat((meta.seq_lens, meta.seq_lens.new_zeros(2))),
    )
    return AttentionMetadata(*(t.to(DEVICE) for t in tensors), [], [], meta.num_decodes + 2 * only_decodes)


def check_attention(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    num_splits: int | None,
) -> None:
    """Against the torch path in float32 on the same rounded inputs; unused memory holds NaN."""
    num_heads, num_kv_heads, head_dim = heads
    meta, num_blocks = batch(lengths, block_size)
    num_rows = sum(meta.query_lens)
    fused = torch.randn(num_rows, num_heads * head_dim + 16).to(dtype)  # q is a slice of a wider projection
    q = fused[:, : num_heads * head_dim].view(num_rows, num_heads, head_dim)
    kv_layer = torch.randn(num_blocks, 2, block_size, num_kv_heads, head_dim).to(dtype)
    scale = head_dim**-0.5
    expected = torch_paged_attention(q.to(torch.float32), kv_layer.to(torch.float32), meta, scale)
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for table, kv_len in zip(meta.block_tables.tolist(), meta.kv_lens, strict=True):
        for position in range(kv_len):
            used[table[position // block_size], position % block_size] = True
    kv_layer.transpose(1, 2)[~used] = float("nan")
    padded = torch.cat((q, q.new_zeros(2, num_heads, head_dim)))
    out = triton_paged_attention(_strided(padded), kv_layer.to(DEVICE), to_device(meta), scale, num_splits=num_splits)
    assert out.dtype == dtype
    if meta.num_decodes == len(meta.seq_lens):
        assert not out[num_rows:].any()
    out = out[:num_rows]
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.cpu().to(torch.float32), expected, rtol=tolerance, atol=tolerance)


def _strided(q: Tensor) -> Tensor:
    """On the device, with the strides of a slice of a wider tensor."""
    wide = torch.zeros(len(q), q.shape[1] + 1, q.shape[2], dtype=q.dtype, device=DEVICE)
    wide[:, : q.shape[1]] = q.to(DEVICE)
    return wide[:, : q.shape[1]]


HEADS = [(9, 3, 64), (4, 2, 80), (2, 2, 96), (4, 1, 128), (4, 2, 16)]
DECODES = [(1, 1), (1, 33), (1, 100), (1, 16)]
PREFILLS = [(5, 5), (70, 70), (3, 40), (30, 75), (2, 65)]
MIXED = [(1, 40), (37, 50), (1, 7), (2, 2), (1, 64), (65, 65)]


def check_all_attention() -> None:
    for i, (heads, dtype) in enumerate(itertools.product(HEADS, DTYPES)):
        block_size = (16, 32)[i % 2]
        check_attention(DECODES, heads, block_size, dtype, num_splits=1 + i % 4)
        check_attention(PREFILLS if i % 3 else PREFILLS[1:3], heads, block_size, dtype, num_splits=1)
        check_attention(MIXED, heads, 48 - block_size, dtype, num_splits=3)
    check_attention(DECODES, (40, 2, 32), 16, torch.float32, num_splits=8)  # a group of 20, splits without keys
    if not INTERPRETED:
        lengths = [(1, 5000), (700, 3000), (1, 1), (2048, 2048), (1, 777)]
        check_attention(lengths, (32, 8, 128), 16, torch.bfloat16, num_splits=None)  # the reference takes long


def check_flash_attention() -> None:
    """Long prompts without a prefix, behind decodes and prompts with one, against the kernel that reads the cache."""
    heads = (16, 8, 128), (9, 3, 64), (14, 2, 64), (4, 2, 80), (8, 2, 96)
    for prefixed, (num_heads, num_kv_heads, head_dim) in itertools.product((100, 1100), heads):
        lengths = [(1, 300), (prefixed, 1900), (2048, 2048), (77, 77), (1500, 1500)]
        meta, num_blocks = batch(lengths, 16)
        starts, tables = meta.cu_seqlens_q.tolist(), meta.block_tables
        assert find_fresh(meta.query_lens, meta.kv_lens, 1) == 2
        assert is_worth_gathering(meta, 2) == (prefixed == 1100)
        shape = sum(meta.query_lens), num_heads + 2 * num_kv_heads, head_dim
        heads = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        kv_layer = torch.randn(num_blocks, 2, 16, num_kv_heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        for i, (query_len, kv_len) in enumerate(lengths):
            position = torch.arange(kv_len - query_len, kv_len)
            block, offset = tables[i][position // 16].long().to(DEVICE), (position % 16).to(DEVICE)
            kv_layer[block, 0, offset] = k[starts[i] : starts[i + 1]]
            kv_layer[block, 1, offset] = v[starts[i] : starts[i + 1]]
        moved = [t.to(DEVICE) for t in (meta.slot_mapping, tables, meta.cu_seqlens_q, meta.seq_lens)]
        meta = AttentionMetadata(*moved, meta.query_lens, meta.kv_lens, meta.num_decodes, fresh_from=2)
        assert first_flash_sequence(q, meta) == 2
        out = triton_paged_attention(q, kv_layer, meta, head_dim**-0.5, k, v)
        expected = triton_paged_attention(q, kv_layer, meta, head_dim**-0.5)
        torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)
        split = AttentionMetadata(*moved, [], [], split=split_at(meta.cu_seqlens_q, 2))  # as a graph knows it
        out = triton_paged_attention(q, kv_layer, split, head_dim**-0.5, k, v)
        torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)


def split_at(starts: Tensor, num_older: int) -> FreshSplit:
    """See FreshSplit."""
    end = starts[num_older]
    count = torch.tensor([num_older], dtype=torch.int32, device=starts.device)
    return FreshSplit(count, torch.minimum(starts, end), torch.maximum(starts, end))


def check_split() -> None:
    """The kernel that reads the cache leaves the rows of fresh sequences, and of none, as they are."""
    for num_older in (0, 3, 4):
        lengths = [(1, 40), (37, 50), (2, 7), (9, 9)] + [(0, 0)] * 2
        meta, num_blocks = batch([pair for pair in lengths if pair[0]], 16)
        q, kv_layer = torch.randn(49, 4, 32), torch.randn(num_blocks, 2, 16, 2, 32)
        expected = torch_paged_attention(q, kv_layer, meta, 0.2)
        end = int(meta.cu_seqlens_q[num_older])
        expected[end:] = 7.0
        padded = replace(to_device(meta), num_decodes=0)
        out = torch.full((60, 4, 32), 7.0, device=DEVICE)
        wide = torch.cat((q, q.new_zeros(11, 4, 32))).to(DEVICE)
        split = split_at(padded.cu_seqlens_q, num_older)
        launch_prefill(wide, kv_layer.to(DEVICE), padded, len(lengths), 0.2, out, None, split)
        torch.testing.assert_close(out[:49].cpu(), expected, rtol=2e-5, atol=2e-5)
        assert bool((out[49:] == 7.0).all())


def check_gathered_kv() -> None:
    """Keys and values of some sequences, of whole blocks and not, into one row of tokens."""
    for block_size, width in ((16, 3), (32, 2)):
        meta, num_blocks = batch([(1, 30), (3, 40), (2, 64), (5, 5)], block_size)
        kv_layer = torch.randn(num_blocks, 2, block_size, width, 48)
        expected = []
        for table, kv_len in zip(meta.block_tables[1:3], meta.kv_lens[1:3], strict=True):
            blocks = kv_layer[table[: -(-kv_len // block_size)].long()]
            expected.append(blocks.transpose(0, 1).flatten(1, 2)[:, :kv_len])
        starts = gathered_starts(meta, 3)
        assert starts.tolist() == [0, 40, 104] and gathered_starts(meta, 3) is starts
        moved = [t.to(DEVICE) for t in (kv_layer, meta.block_tables[1:3], meta.seq_lens[1:3], starts)]
        k, v = triton_gather_kv(*moved, meta.kv_lens[1:3])
        assert torch.equal(torch.stack((k, v)).cpu(), torch.cat(expected, 1))


def check_worth_gathering() -> None:
    """Chunks of some size alone, and not where lengths are unknown, as in a graph, or the keys are too many."""
    meta, _ = batch([(1, 900), (600, 800), (600, 600)], 16)
    assert is_worth_gathering(meta, 2) and is_worth_gathering(meta, 3) and not is_worth_gathering(meta, 1)
    assert not is_worth_gathering(batch([(1, 900), (500, 800)], 16)[0], 2)
    unknown = AttentionMetadata(meta.slot_mapping, meta.block_tables, meta.cu_seqlens_q, meta.seq_lens, [], [])
    assert not is_worth_gathering(unknown, 3)
    for num_keys, is_worth in ((65536, True), (65537, False)):
        assert is_worth_gathering(batch([(600, num_keys)], 32)[0], 1) == is_worth


def check_fresh() -> None:
    assert find_fresh([1, 5, 9], [30, 5, 9], 1) == 1
    assert find_fresh([1, 5, 9], [30, 5, 12], 1) == 3
    assert find_fresh([4, 5, 9], [30, 5, 9], 0) == 1
    assert find_fresh([1, 1], [1, 1], 2) == 2


def check_num_splits() -> None:
    assert choose_num_splits(8, 40_960, 132) == 32
    assert choose_num_splits(8, 1024, 132) == 8
    assert choose_num_splits(64, 40_960, 132) == 8  # 512 programs of 528 that run at once
    assert choose_num_splits(96, 40_960, 132) == 5
    assert choose_num_splits(128, 40_960, 132) == choose_num_splits(192, 40_960, 132) == 2
    assert choose_num_splits(200, 40_960, 132) == choose_num_splits(256, 40_960, 132) == 1
    assert choose_num_splits(512, 40_960, 132) == 1
    assert choose_num_splits(2048, 40_960, 132) == 1
    assert choose_num_splits(1, 16, 132) == 1


def check_norms() -> None:
    """Rows of any width, contiguous or heads within a wider tensor; the reference runs on the CPU."""
    for dtype, width in itertools.product(DTYPES, (20, 64, 576, 1024)):
        x = torch.randn(5, 7, width).to(dtype)
        weight = torch.randn(width).to(dtype)
        for heads in (slice(2, 5), 0):
            normed = triton_rms_norm(x.to(DEVICE)[:, heads], weight.to(DEVICE), 1e-6)
            expected = rms_norm(x[:, heads], weight, 1e-6)
            torch.testing.assert_close(normed.cpu(), expected, atol=TOLERANCE[dtype], rtol=2e-2)
        x, addend = (torch.randn(6, width).to(dtype) for _ in range(2))
        summed = x.clone().to(DEVICE)
        normed = triton_rms_norm(summed, weight.to(DEVICE), 1e-6, addend.to(DEVICE))
        expected = rms_norm(x, weight, 1e-6, addend)
        torch.testing.assert_close(normed.cpu(), expected, atol=TOLERANCE[dtype], rtol=2e-2)
        torch.testing.assert_close(summed.cpu(), x, atol=TOLERANCE[dtype], rtol=1e-2)
    assert triton_rms_norm(torch.empty(0, 64).to(DEVICE), torch.ones(64).to(DEVICE), 1e-6).shape == (0, 64)


def check_gather_and_scatter() -> None:
    kv = torch.randn(4, 9, 2, 16, 3, 64).to(DEVICE)  # 6,144 elements a block: two pieces, the last one partial
    ids = torch.tensor([7, 2, 5], device=DEVICE)
    data = triton_gather_blocks(kv[1:3], ids)
    assert data.is_contiguous()
    assert torch.equal(data, kv[1:3].index_select(1, ids))
    target = torch.randn(4, 12, 2, 16, 3, 64).to(DEVICE)
    expected = target.clone()
    expected[1:3, torch.tensor([11, 0, 4], device=DEVICE)] = data
    triton_scatter_blocks(target[1:3], torch.tensor([11, 0, 4], device=DEVICE), data)
    assert torch.equal(target, expected)
    assert triton_gather_blocks(kv, ids[:0]).shape == (4, 0, 2, 16, 3, 64)


def check_packing() -> None:
    """Into the midst of a buffer, with ids from the midst of another; nothing around them changes."""
    kv = torch.randn(4, 9, 2, 16, 3, 64).to(DEVICE)
    size, offset = 2 * 2 * kv.stride(1), 256
    flat = torch.randn(offset + size + 256).to(DEVICE)
    expected = flat.clone()
    expected[offset : offset + size] = kv[1:3, [2, 5]].flatten()
    ids = torch.tensor([7, 2, 5, 1], device=DEVICE)
    copy_pieces(kv, flat, ids, 2, 2, first_layer=1, flat_offset=offset, first_id=1, scatter=False)
    assert torch.equal(flat, expected)
    target = torch.zeros_like(kv)
    copy_pieces(target, flat, ids, 2, 2, first_layer=2, flat_offset=offset, first_id=2, scatter=True)
    assert torch.equal(target[2:4, [5, 1]], kv[1:3, [2, 5]])
    target[2:4, [5, 1]] = 0
    assert not target.any()


def check_packing_of_heads() -> None:
    """Some heads of each block, by the kernel and by its reference; the others stay as they are."""
    kv, ids = torch.randn(4, 9, 2, 16, 6, 64), torch.tensor([7, 2, 5, 1])
    for heads in (HeadRange(0, 2), HeadRange(3, 3), HeadRange(5, 1), HeadRange(0, 6)):
        part = kv.narrow(-2, *heads)
        size = 2 * 2 * part[0, 0].numel()
        for pack, unpack, device in (
            (pack_blocks, unpack_blocks, "cpu"),
            (partial(pack_by_kernel, scatter=False), partial(pack_by_kernel, scatter=True), DEVICE),
        ):
            flat, target = torch.zeros(256 + size + 256).to(device), torch.randn(4, 9, 2, 16, 6, 64).to(device)
            packed = PackedBlocks(flat, 256, ids.to(device), 1, 2, heads)
            pack(kv.to(device), range(1, 3), packed)
            assert torch.equal(flat[256 : 256 + size].cpu(), part[1:3, [2, 5]].flatten()), f"packed: {heads}, {device}"
            assert not flat[:256].any() and not flat[256 + size :].any()
            expected = target.clone()
            expected.narrow(-2, *heads)[2:4, [2, 5]] = part[1:3, [2, 5]].to(device)
            unpack(target, range(2, 4), packed)
            assert torch.equal(target, expected), f"unpacked: {heads}, {device}"


def pack_by_kernel(kv: torch.Tensor, layers: range, packed: PackedBlocks, *, scatter: bool) -> None:
    places: dict[str, Any] = {"first_layer": layers.start, "flat_offset": packed.offset, "first_id": packed.first_id}
    flat, ids, heads = packed.flat, packed.ids, packed.heads
    copy_pieces(kv, flat, ids, packed.num_blocks, len(layers), **places, heads=heads, scatter=scatter)


CHECKS = {
    "fresh": check_fresh,
    "split": check_split,
    "gathered_kv": check_gathered_kv,
    "worth_gathering": check_worth_gathering,
    "attention": check_all_attention,
    "num_splits": check_num_splits,
    "norms": check_norms,
    "gather_and_scatter": check_gather_and_scatter,
    "packing": check_packing,
    "packing of heads": check_packing_of_heads,
}

if DEVICE == "cuda" and is_available(torch.device("cuda"), torch.bfloat16):
    CHECKS["flash attention"] = check_flash_attention

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
