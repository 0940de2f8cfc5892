"""Attention over a paged KV cache: prompts, chunks of prompts and decode steps in one call.

On CPU every row goes through torch's fused attention in shapes that depend on its absolute position alone:

- keys are gathered into a contiguous [padded_len, num_kv_heads, head_dim], where ``padded_len`` is the end of the
  *span* that holds the row's position (spans end at 64, 128, 256, then at every multiple of 256). Padding repeats
  the sequence's first token and is masked, so that nothing of another sequence is ever read;
- the number of rows of each GEMM is padded to a multiple of 8: query tokens in a prefill, the query heads that share
  a KV head in a decode step.

Measured with torch 2.13, float32, one and two threads, head sizes 16 to 128: under these shapes a row's result is
bitwise the same whatever else is in the batch, however the prompt was cut into chunks, and whether a decode step or
a prefill computed it. Without the padding it is not: the GEMM inside changes with fewer than 4 rows, and with the
number of keys in its last tile. ``torch.bmm`` with a softmax between is invariant under the same padding, and slower
at every size tried.
"""

from __future__ import annotations

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


class PrefillCall(NamedTuple):
    """Consecutive query tokens of one sequence that lie in one span.

    Attributes:
        rows: of q.
        gather: index into CpuPlan.gathers.
        kv_len: L, the span's end.
        mask: [padded rows, L] float, 0 or -inf; a view of a mask that all spans share.
    """

    rows: slice
    gather: int
    kv_len: int
    mask: Tensor


class DecodeCall(NamedTuple):
    """One query token of each of B sequences whose positions lie in the same span, which ends at L.

    Attributes:
        rows: of q; a slice if they are consecutive, else [B] int64.
        mask: [B, 1, 1, L] float, 0 or -inf.
    """

    rows: slice | Tensor
    gather: int
    mask: Tensor


class Gather(NamedTuple):
    """What to gather for B sequences: token_rows [2 * B * L] int64 indexes kv_layer.view(-1, Hkv * d), all the keys
    first, then all the values."""

    token_rows: Tensor
    batch: int
    padded_len: int


class CpuPlan(NamedTuple):
    """What the CPU path derives from the metadata once, for all layers.

    Attributes:
        scratch: [largest gather, Hkv * d]; what is gathered goes here, since fresh memory costs more than the copy.
    """

    scratch: Tensor
    gathers: list[Gather]
    prefills: list[PrefillCall]
    decodes: list[DecodeCall]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMetadata:
    """Which rows of a flat batch of T tokens belong to which of B sequences, and where their KV lives.

    The KV of this step's tokens is in the cache before attention runs, so kv_lens include it.

    Attributes:
        slot_mapping: [T] int64, block * block_size + offset of each token's own KV.
        block_tables: [B, max_blocks] int32; only the first ceil(kv_len / block_size) of a row are read.
        cu_seqlens_q: [B + 1] int32, start of each sequence's rows.
        seq_lens: [B] int32, KV lengths.
        query_lens, kv_lens: host copies; each query_len is between 1 and its kv_len.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    query_lens: list[int]
    kv_lens: list[int]
    _cpu_plans: dict[tuple[int, int, torch.dtype], CpuPlan] = field(default_factory=dict, init=False, repr=False)


def paged_attention(q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
    """Causal attention of each sequence's query tokens over its cached keys and values.

    Query token i of a sequence sees the first ``kv_len - query_len + i + 1`` keys.

    Args:
        q: [T, num_heads, head_dim].
        kv_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim], contiguous; [:, 0] keys, [:, 1] values.
        scale: factor on the dot products.

    Returns:
        [T, num_heads, head_dim], q's dtype. Rows past the last sequence's are zero.
    """
    return torch_paged_attention(q, kv_layer, meta, scale)


def torch_paged_attention(q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
    """The torch path of paged_attention, meant for CPU."""
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    tokens = kv_layer.view(-1, num_kv_heads * head_dim)
    key = (block_size, tokens.shape[1], q.dtype)
    plan = meta._cpu_plans.get(key)
    if plan is None:
        plan = meta._cpu_plans[key] = plan_cpu_attention(meta, *key)

    out = torch.empty_like(q)
    out[sum(meta.query_lens) :] = 0
    for decode in plan.decodes:
        k, v = _gather_kv(tokens, plan, decode.gather, head_dim)
        out[decode.rows] = _decode(q[decode.rows], k, v, decode.mask, scale)
    gathered = -1
    for prefill in plan.prefills:
        if prefill.gather != gathered:
            gathered = prefill.gather
            k, v = _gather_kv(tokens, plan, gathered, head_dim)
        out[prefill.rows] = _prefill(
            q[prefill.rows], k[:, :, : prefill.kv_len], v[:, :, : prefill.kv_len], prefill.mask, scale
        )
    return out


def _gather_kv(tokens: Tensor, plan: CpuPlan, index: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values, [B, Hkv, L, d] each, tokens outermost in memory; valid until the next gather."""
    gather = plan.gathers[index]
    scratch = plan.scratch[: len(gather.token_rows)]
    torch.index_select(tokens, 0, gather.token_rows, out=scratch)
    k, v = scratch.view(2, gather.batch, gather.padded_len, -1, head_dim).transpose(2, 3)
    return k, v


def _decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[B, Hq, d] over [B, Hkv, L, d]: the query heads of a KV head are the rows of one GEMM."""
    batch, num_kv_heads, kv_len, head_dim = k.shape
    group = q.shape[1] // num_kv_heads
    packed = q.view(batch, num_kv_heads, group, head_dim)
    packed = F.pad(packed, (0, 0, 0, -group % ROW_MULTIPLE))
    mask = mask.expand(batch, 1, packed.shape[2], kv_len)
    out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
    return out[:, :, :group].reshape(q.shape)


def _prefill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[rows, Hq, d] over [1, Hkv, L, d]."""
    num_rows = len(q)
    q = F.pad(q, (0, 0, 0, 0, 0, -num_rows % ROW_MULTIPLE)).transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)[:num_rows]


def padded_kv_len(kv_len: int) -> int:
    """End of the span that holds position ``kv_len - 1``: how many keys its row is computed over."""
    for end in SHORT_SPANS:
        if kv_len <= end:
            return end
    return -(-kv_len // SPAN) * SPAN


def plan_cpu_attention(meta: AttentionMetadata, block_size: int, token_width: int, dtype: torch.dtype) -> CpuPlan:
    """Group the batch into fused-attention calls whose shapes depend only on absolute positions."""
    plan = CpuPlan(torch.empty(0, token_width, dtype=dtype), [], [], [])
    starts = meta.cu_seqlens_q.tolist()
    prefills: list[int] = []
    decodes: dict[int, list[int]] = defaultdict(list)
    for i, (query_len, kv_len) in enumerate(zip(meta.query_lens, meta.kv_lens, strict=True)):
        assert 1 <= query_len <= kv_len, f"sequence {i}: query_len {query_len}, kv_len {kv_len}"
        if query_len > 1:
            prefills.append(i)
        else:
            decodes[padded_kv_len(kv_len)].append(i)
    if prefills:
        causal = _causal_mask(padded_kv_len(max(meta.kv_lens[i] for i in prefills)), dtype)
        for i in prefills:
            _plan_prefill(plan, meta, i, starts[i], block_size, causal)
    for padded_len, sequences in decodes.items():
        size = max(1, MAX_DECODE_GATHER // padded_len)
        for first in range(0, len(sequences), size):
            _plan_decode(plan, meta, sequences[first : first + size], starts, padded_len, block_size, dtype)
    plan.scratch.resize_(max(len(gather.token_rows) for gather in plan.gathers), token_width)
    return plan


def _causal_mask(max_len: int, dtype: torch.dtype) -> Tensor:
    """[SPAN + 7, max_len + SPAN]: -inf where the column is past max_len + row, else 0.

    Columns from max_len - start on are the mask of a span of queries at positions start, start + 1, …
    """
    rows = SPAN + ROW_MULTIPLE - 1
    return torch.full((rows, max_len + SPAN), float("-inf"), dtype=dtype).triu_(max_len + 1)


def _plan_prefill(
    plan: CpuPlan, meta: AttentionMetadata, i: int, first_row: int, block_size: int, causal: Tensor
) -> None:
    """One gather for the sequence, and one call for each span that its query rows touch."""
    query_len, kv_len = meta.query_lens[i], meta.kv_lens[i]
    gather = _add_gather(plan, meta.block_tables[i : i + 1], torch.tensor([kv_len]), padded_kv_len(kv_len), block_size)
    position = kv_len - query_len
    while position < kv_len:
        span_end = padded_kv_len(position + 1)
        end = min(span_end, kv_len)
        num_padded = -(-(end - position) // ROW_MULTIPLE) * ROW_MULTIPLE
        offset = causal.shape[1] - SPAN - position
        mask = causal[:num_padded, offset : offset + span_end]
        plan.prefills.append(PrefillCall(slice(first_row, first_row + end - position), gather, span_end, mask))
        first_row += end - position
        position = end


def _plan_decode(
    plan: CpuPlan,
    meta: AttentionMetadata,
    sequences: list[int],
    starts: list[int],
    padded_len: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    kv_lens = torch.tensor([meta.kv_lens[i] for i in sequences])
    gather = _add_gather(plan, meta.block_tables[sequences], kv_lens, padded_len, block_size)
    hidden = torch.arange(padded_len) >= kv_lens[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
    rows = [starts[i] for i in sequences]
    consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
    plan.decodes.append(
        DecodeCall(slice(rows[0], rows[0] + len(rows)) if consecutive else torch.tensor(rows), gather, mask)
    )


def _add_gather(plan: CpuPlan, block_tables: Tensor, kv_lens: Tensor, padded_len: int, block_size: int) -> int:
    """Gather the first kv_len tokens of each sequence, and its first token again up to padded_len."""
    token = torch.arange(padded_len)
    token = torch.where(token < kv_lens[:, None], token, 0)  # [B, padded_len]
    blocks = block_tables.to(torch.int64).gather(1, token // block_size)
    keys = blocks * (2 * block_size) + token % block_size
    token_rows = torch.stack((keys, keys + block_size)).view(-1)
    plan.gathers.append(Gather(token_rows, len(kv_lens), padded_len))
    return len(plan.gathers) - 1
