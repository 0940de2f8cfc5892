"""The Triton counterparts of kv_store's functions: one program for each token, or for each piece of a block."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 4096  # elements of a block that one program copies


@triton.jit
def store_kernel(
    k_ptr,
    v_ptr,
    kv_ptr,
    slot_mapping_ptr,
    stride_k,
    stride_v,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # Hkv * d
    PADDED_WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    element = tl.arange(0, PADDED_WIDTH)
    mask = element < WIDTH
    key = kv_ptr + (slot // BLOCK_SIZE * (2 * BLOCK_SIZE) + slot % BLOCK_SIZE) * WIDTH + element
    k = tl.load(k_ptr + token * stride_k + element, mask=mask)
    v = tl.load(v_ptr + token * stride_v + element, mask=mask)
    tl.store(key, k.to(kv_ptr.dtype.element_ty), mask=mask)
    tl.store(key + BLOCK_SIZE * WIDTH, v.to(kv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def copy_kernel(
    source_ptr,
    destination_ptr,
    block_ids_ptr,
    source_stride_layer,
    destination_stride_layer,
    NUMEL: tl.constexpr,  # elements of a block
    PIECE: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Block i of one layer, from pool block block_ids[i] (gather) or into it (scatter)."""
    piece = tl.program_id(0)
    i = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    block = tl.load(block_ids_ptr + i)
    source, destination = block, i
    if SCATTER:
        source, destination = i, block
    element = piece * PIECE + tl.arange(0, PIECE)
    mask = element < NUMEL
    data = tl.load(source_ptr + layer * source_stride_layer + source * NUMEL + element, mask=mask)
    tl.store(destination_ptr + layer * destination_stride_layer + destination * NUMEL + element, data, mask=mask)


def triton_store_kv(k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
    """store_kv; the heads of a token must be contiguous, tokens may be strided."""
    assert k[0].is_contiguous() and v[0].is_contiguous() and kv_layer.is_contiguous()
    width = k.shape[1] * k.shape[2]
    store_kernel[(len(k),)](
        k, v, kv_layer, slot_mapping, k.stride(0), v.stride(0),
        BLOCK_SIZE=kv_layer.shape[2], WIDTH=width, PADDED_WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip


def triton_gather_blocks(layers: Tensor, block_ids: Tensor) -> Tensor:
    """layers [L, num_blocks, ...], block_ids [n] int64 → [L, n, ...], contiguous."""
    data = torch.empty(len(layers), len(block_ids), *layers.shape[2:], dtype=layers.dtype, device=layers.device)
    _copy(layers, data, block_ids, scatter=False)
    return data


def triton_scatter_blocks(layers: Tensor, block_ids: Tensor, data: Tensor) -> None:
    """Write data [L, n, ...] into layers [L, num_blocks, ...]."""
    _copy(data.contiguous(), layers, block_ids, scatter=True)


def _copy(source: Tensor, destination: Tensor, block_ids: Tensor, *, scatter: bool) -> None:
    assert source[0].is_contiguous() and destination[0].is_contiguous()
    numel = source[0, 0].numel()
    if len(block_ids) == 0 or len(source) == 0:
        return
    copy_kernel[triton.cdiv(numel, PIECE), len(block_ids), len(source)](
        source, destination, block_ids, source.stride(0), destination.stride(0),
        NUMEL=numel, PIECE=PIECE, SCATTER=scatter,
    )  # fmt: skip
