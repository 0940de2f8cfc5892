"""Attention over a paged KV cache: prompts, chunks of prompts and decode steps in one call.

On CPU every row goes through torch's fused attention in shapes that depend on its absolute position alone:

- keys are gathered into a contiguous [padded_len, num_kv_heads, head_dim], where ``padded_len`` is the end of the
  *span* that holds the row's position (spans end at 64, 128, 256, then at every multiple of 256). Padding repeats
  the sequence's first token and is masked, so that nothing of another sequence is ever read;
- the number of rows of each GEMM is padded to a multiple of 8: query tokens in a prefill, the query heads that share
  a KV head in a decode step.

Measured with torch 2.13, float32, one and two threads, head sizes 16 to 128, on processors of AMD and Intel: under
these shapes a row's result is bitwise the same whatever else is in the batch, however the prompt was cut into chunks,
and whether a decode step or a prefill computed it. Without the padding it is not: the GEMM inside changes with fewer
than 4 rows, and with the number of keys in its last tile. ``torch.bmm`` with a softmax between is invariant under the
same padding, and slower at every size tried.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SPAN = 256
SHORT_SPANS = (64, 128, 256)
ROW_MULTIPLE = 8
MAX_DECODE_GATHER = 1024  # tokens; what one decode call gathers should stay in the core's cache


class Gather(NamedTuple):
    """Copies the KV of B sequences, padded to L tokens each, into the plan's scratch memory.

    Attributes:
        token_rows: [2 * B * L] int64, index into kv_layer.view(-1, Hkv * d); all the keys, then all the values.
        target: [2 * B * L, Hkv * d].
        k, v: [B, Hkv, L, d], views of target; tokens are outermost in memory. Valid until the next gather.
    """

    token_rows: Tensor
    target: Tensor
    k: Tensor
    v: Tensor


class PrefillCall(NamedTuple):
    """Consecutive query tokens of one sequence that lie in one span.

    Attributes:
        rows: of q.
        kv_len: the span's end.
        mask: [1, 1, padded rows, kv_len] float, 0 or -inf; a view of a mask that all spans share.
    """

    rows: slice
    gather: Gather
    kv_len: int
    mask: Tensor


class DecodeCall(NamedTuple):
    """One query token of each of B sequences whose positions lie in the same span, which ends at L.

    Attributes:
        rows: of q; a slice if they are consecutive, else [B] int64.
        packed: [B, Hkv, padded group, d], where the queries go; the padding is zero.
        mask: [B, 1, padded group, L] float, 0 or -inf.
    """

    rows: slice | Tensor
    gather: Gather
    packed: Tensor
    mask: Tensor


class CpuPlan(NamedTuple):
    """Values that the CPU path derives from the metadata once for all layers."""

    prefills: list[PrefillCall]
    decodes: list[DecodeCall]


class KvShape(NamedTuple):
    """The shape that a plan depends on besides the metadata. group: query heads per KV head."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    group: int
    dtype: torch.dtype


class FreshSplit(NamedTuple):
    """Where a step's sequences become fresh, for kernels that take one kind each: the other kind has no rows for them.

    Attributes:
        num_older: [1] int32, sequences ahead of the fresh ones.
        older_starts, fresh_starts: [B + 1] int32, cu_seqlens_q of either kind.
    """

    num_older: Tensor
    older_starts: Tensor
    fresh_starts: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMetadata:
    """The layout of a flat batch of T tokens of B sequences, and the location of their KV.

    The KV of this step's tokens is in the cache before attention runs, so kv_lens include it.

    Attributes:
        slot_mapping: [T] int64, block * block_size + offset of each token's own KV.
        block_tables: [B, max_blocks] int32; only the first ceil(kv_len / block_size) of a row are read.
        cu_seqlens_q: [B + 1] int32, start of each sequence's rows.
        seq_lens: [B] int32, KV lengths.
        query_lens, kv_lens: host copies; each query_len is between 1 and its kv_len.
        num_decodes: the first so many sequences have one query token each.
        fresh_from: the sequences from this one on have no KV but that of this step's tokens; see find_fresh.
        split: of a graph, which runs steps whose lengths the host does not know; None: fresh_from says it.
        gathered: what pdray.kernels.attention.flash derives from the others once for all layers.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    query_lens: list[int]
    kv_lens: list[int]
    num_decodes: int = 0
    fresh_from: int = sys.maxsize
    split: FreshSplit | None = None
    _cpu_plans: dict[KvShape, CpuPlan] = field(default_factory=dict, init=False, repr=False)
    gathered: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)


def find_fresh(query_lens: list[int], kv_lens: list[int], num_decodes: int) -> int:
    """Index of the first of the trailing sequences without a cached prefix: AttentionMetadata.fresh_from."""
    first = len(query_lens)
    while first > num_decodes and query_lens[first - 1] == kv_lens[first - 1]:
        first -= 1
    return first


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    meta: AttentionMetadata,
    scale: float,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's query tokens over its cached keys and values.

    Query token i of a sequence sees the first ``kv_len - query_len + i + 1`` keys.

    Args:
        q: [T, num_heads, head_dim].
        kv_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim], contiguous; [:, 0] keys, [:, 1] values.
        scale: factor on the dot products.
        new_k, new_v: [T, num_kv_heads, head_dim], what the cache holds of this step's tokens; on CUDA fresh
            sequences may then be read from there.

    Returns:
        [T, num_heads, head_dim], q's dtype. Rows past the last sequence's are zero, on CUDA left to chance.
    """
    if q.is_cuda:
        from pdray.kernels.attention.paged_triton import triton_paged_attention

        return triton_paged_attention(q, kv_layer, meta, scale, new_k, new_v)
    return torch_paged_attention(q, kv_layer, meta, scale)


def torch_paged_attention(q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
    """The torch path of paged_attention, meant for CPU."""
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    shape = KvShape(block_size, num_kv_heads, head_dim, q.shape[1] // num_kv_heads, q.dtype)
    plan = meta._cpu_plans.get(shape)
    if plan is None:
        plan = meta._cpu_plans[shape] = plan_cpu_attention(meta, shape)

    tokens = kv_layer.view(-1, num_kv_heads * head_dim)
    out = torch.empty_like(q)
    num_rows = sum(meta.query_lens)
    if num_rows < len(q):
        out[num_rows:] = 0
    gathered: Gather | None = None
    for prefill in plan.prefills:
        if prefill.gather is not gathered:
            gathered = prefill.gather
            torch.index_select(tokens, 0, gathered.token_rows, out=gathered.target)
        out[prefill.rows] = _prefill(q[prefill.rows], prefill, scale)
    for decode in plan.decodes:
        torch.index_select(tokens, 0, decode.gather.token_rows, out=decode.gather.target)
        _decode(q, decode, scale, out)
    return out


def _prefill(q: Tensor, call: PrefillCall, scale: float) -> Tensor:
    """[rows, Hq, d] for rows of one sequence."""
    num_rows = len(q)
    q = F.pad(q, (0, 0, 0, 0, 0, -num_rows % ROW_MULTIPLE)).transpose(0, 1)[None]
    k, v = call.gather.k[:, :, : call.kv_len], call.gather.v[:, :, : call.kv_len]
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask, scale=scale, enable_gqa=True)
    return result[0].transpose(0, 1)[:num_rows]


def _decode(q: Tensor, call: DecodeCall, scale: float, out: Tensor) -> None:
    """Fill the call's rows of out [T, Hq, d]. The query heads of a KV head are the rows of one GEMM."""
    batch, num_kv_heads, _, head_dim = call.packed.shape
    group = q.shape[1] // num_kv_heads
    call.packed[:, :, :group] = q[call.rows].view(batch, num_kv_heads, group, head_dim)
    result = F.scaled_dot_product_attention(call.packed, call.gather.k, call.gather.v, attn_mask=call.mask, scale=scale)
    out.view(-1, num_kv_heads, group, head_dim)[call.rows] = result[:, :, :group]


def padded_kv_len(kv_len: int) -> int:
    """End of the span that holds position ``kv_len - 1``: how many keys its row is computed over."""
    for end in SHORT_SPANS:
        if kv_len <= end:
            return end
    return -(-kv_len // SPAN) * SPAN


def plan_cpu_attention(meta: AttentionMetadata, shape: KvShape) -> CpuPlan:
    """Group the batch into fused-attention calls whose shapes depend only on absolute positions."""
    plan = CpuPlan([], [])
    starts = meta.cu_seqlens_q.tolist()
    max_padded_len = padded_kv_len(max(meta.kv_lens))
    width = shape.num_kv_heads * shape.head_dim
    scratch = torch.empty(2 * max(max_padded_len, MAX_DECODE_GATHER), width, dtype=shape.dtype)
    causal = None
    decodes: dict[int, list[int]] = defaultdict(list)
    for i, (query_len, kv_len) in enumerate(zip(meta.query_lens, meta.kv_lens, strict=True)):
        assert 1 <= query_len <= kv_len, f"sequence {i}: query_len {query_len}, kv_len {kv_len}"
        if query_len == 1:
            decodes[padded_kv_len(kv_len)].append(i)
            continue
        if causal is None:
            causal = _causal_mask(max_padded_len, shape.dtype)
        plan.prefills.extend(_plan_prefill(meta, i, starts[i], shape, scratch, causal))
    for padded_len, sequences in decodes.items():
        size = max(1, MAX_DECODE_GATHER // padded_len)
        for first in range(0, len(sequences), size):
            some = sequences[first : first + size]
            plan.decodes.append(_plan_decode(meta, some, [starts[i] for i in some], padded_len, shape, scratch))
    return plan


def _causal_mask(max_len: int, dtype: torch.dtype) -> Tensor:
    """[SPAN + 7, max_len + SPAN]: -inf where the column is past max_len + row, else 0.

    Columns from max_len - start on are the mask of a span of queries at positions start, start + 1, …
    """
    rows = SPAN + ROW_MULTIPLE - 1
    return torch.full((rows, max_len + SPAN), float("-inf"), dtype=dtype).triu_(max_len + 1)


def _plan_prefill(
    meta: AttentionMetadata, i: int, first_row: int, shape: KvShape, scratch: Tensor, causal: Tensor
) -> list[PrefillCall]:
    """A call for each span that the sequence's query rows touch; they share one gather."""
    query_len, kv_len = meta.query_lens[i], meta.kv_lens[i]
    gather = _gather(meta.block_tables[i : i + 1], torch.tensor([kv_len]), padded_kv_len(kv_len), shape, scratch)
    calls = []
    position = kv_len - query_len
    while position < kv_len:
        span_end = padded_kv_len(position + 1)
        end = min(span_end, kv_len)
        num_padded = -(-(end - position) // ROW_MULTIPLE) * ROW_MULTIPLE
        offset = causal.shape[1] - SPAN - position
        mask = causal[None, None, :num_padded, offset : offset + span_end]
        calls.append(PrefillCall(slice(first_row, first_row + end - position), gather, span_end, mask))
        first_row += end - position
        position = end
    return calls


def _plan_decode(
    meta: AttentionMetadata, sequences: list[int], rows: list[int], padded_len: int, shape: KvShape, scratch: Tensor
) -> DecodeCall:
    kv_lens = torch.tensor([meta.kv_lens[i] for i in sequences])
    gather = _gather(meta.block_tables[sequences], kv_lens, padded_len, shape, scratch)
    padded_group = -(-shape.group // ROW_MULTIPLE) * ROW_MULTIPLE
    packed = torch.zeros(len(rows), shape.num_kv_heads, padded_group, shape.head_dim, dtype=shape.dtype)
    hidden = torch.arange(padded_len) >= kv_lens[:, None]
    mask = torch.zeros(hidden.shape, dtype=shape.dtype).masked_fill_(hidden, float("-inf"))
    mask = mask[:, None, None].expand(-1, -1, padded_group, -1)
    consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
    return DecodeCall(slice(rows[0], rows[0] + len(rows)) if consecutive else torch.tensor(rows), gather, packed, mask)


def _gather(block_tables: Tensor, kv_lens: Tensor, padded_len: int, shape: KvShape, scratch: Tensor) -> Gather:
    """Gather the first kv_len tokens of each sequence, padded to padded_len with its first token."""
    batch = len(kv_lens)
    token = torch.arange(padded_len)
    token = torch.where(token < kv_lens[:, None], token, 0)  # [B, padded_len]
    blocks = block_tables.to(torch.int64).gather(1, token // shape.block_size)
    keys = blocks * (2 * shape.block_size) + token % shape.block_size
    token_rows = torch.stack((keys, keys + shape.block_size)).view(-1)
    target = scratch[: len(token_rows)]
    k, v = target.view(2, batch, padded_len, shape.num_kv_heads, shape.head_dim).transpose(2, 3)
    return Gather(token_rows, target, k, v)
