"""The Triton counterpart of rotate_and_store: one program of one warp for a few heads of one token."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.crossover import ROTARY_MANY_PAIRS, ROTARY_MANY_TOKENS, ROTARY_PAIRS
from pdray.kernels.dependent_launch import begin, dependent_launch


@triton.jit
def rotate_and_store_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    kv_ptr,
    slot_mapping_ptr,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # of the head's width
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    PADDED_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, PADDED_HALF)[None, :]
    inside = at < HALF
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & inside
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    source = qkv_ptr + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * (2 * HALF) + at
    slot = tl.load(slot_mapping_ptr + token)
    position = tl.load(positions_ptr + token)
    begin(DEPENDENT)  # the step's inputs, above, were there before its first kernel
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + HALF, mask=mask, other=0.0)
    angle = position * HALF + at
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)

    dtype = qkv_ptr.dtype.element_ty
    a, b = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1)[:, None] / (2 * HALF) + eps)
        a_weight = load_norm(q_norm_ptr, k_norm_ptr, is_query, at, inside)
        b_weight = load_norm(q_norm_ptr, k_norm_ptr, is_query, at + HALF, inside)
        a = ((a * scale).to(dtype).to(tl.float32) * a_weight).to(dtype).to(tl.float32)
        b = ((b * scale).to(dtype).to(tl.float32) * b_weight).to(dtype).to(tl.float32)
    rotated_first = (a * cos - b * sin).to(dtype)
    rotated_second = (b * cos + a * sin).to(dtype)

    is_rotated = mask & (head < NUM_HEADS + NUM_KV_HEADS)
    tl.store(source, rotated_first, mask=is_rotated)
    tl.store(source + HALF, rotated_second, mask=is_rotated)
    kv_head = tl.where(is_value, head - NUM_HEADS - NUM_KV_HEADS, head - NUM_HEADS)
    plane = slot // BLOCK_SIZE * 2 + is_value.to(tl.int64)  # keys or values of a block
    place = (plane * BLOCK_SIZE + slot % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
    key_or_value = kv_ptr + place * (2 * HALF) + at
    kv_dtype = kv_ptr.dtype.element_ty
    tl.store(key_or_value, tl.where(is_value, first, rotated_first).to(kv_dtype), mask=mask & (head >= NUM_HEADS))
    second = tl.where(is_value, second, rotated_second)
    tl.store(key_or_value + HALF, second.to(kv_dtype), mask=mask & (head >= NUM_HEADS))


@triton.jit
def load_norm(q_norm_ptr, k_norm_ptr, is_query, at, inside):
    """Weights [HEADS, PADDED_HALF] float32: each head's own."""
    q_norm = tl.load(q_norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    k_norm = tl.load(k_norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_query, q_norm, k_norm)


def triton_rotate_and_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> None:
    """See rotary_store.rotate_and_store; rotates in place. Everything contiguous, on the current stream."""
    assert qkv.is_contiguous() and kv_layer.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    padded_half = triton.next_power_of_2(head_dim // 2)
    heads = max(1, (ROTARY_PAIRS if len(qkv) < ROTARY_MANY_TOKENS else ROTARY_MANY_PAIRS) // padded_half)
    if len(qkv):
        rotate_and_store_kernel[(len(qkv), triton.cdiv(num_heads + 2 * num_kv_heads, heads))](
            qkv, q_norm, k_norm, cos, sin, positions, kv_layer, slot_mapping, eps,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2, BLOCK_SIZE=block_size,
            HEADS=heads, PADDED_HALF=padded_half, HAS_NORM=q_norm is not None, num_warps=1,
            **dependent_launch(qkv.device),
        )  # fmt: skip
