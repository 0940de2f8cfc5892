"""Writing, copying and moving KV blocks, against plain loops."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from pdray.kernels.kv.blocks import copy_blocks, gather_blocks, scatter_blocks, store_kv


def random_pool(num_layers: int = 3, num_blocks: int = 9, block_size: int = 16) -> Tensor:
    return torch.randn(num_layers, num_blocks, 2, block_size, 2, 8)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_writes_each_slot_and_nothing_else(block_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kv = random_pool(block_size=block_size).to(dtype)
    expected = kv.clone()
    slots = random.Random(1).sample(range(9 * block_size), 40)
    k, v = torch.randn(40, 2, 8).to(dtype), torch.randn(40, 2, 8).to(dtype)
    for i, slot in enumerate(slots):
        expected[1, slot // block_size, 0, slot % block_size] = k[i]
        expected[1, slot // block_size, 1, slot % block_size] = v[i]
    store_kv(k, v, kv[1], torch.tensor(slots))
    assert torch.equal(kv, expected)


def test_store_takes_slices_of_a_fused_projection() -> None:
    torch.manual_seed(0)
    fused = torch.randn(5, 4 * 8 + 2 * 2 * 8)
    k, v = fused[:, 32:48].view(5, 2, 8), fused[:, 48:].view(5, 2, 8)
    kv = torch.zeros(1, 3, 2, 16, 2, 8)
    store_kv(k, v, kv[0], torch.arange(20, 25))
    assert torch.equal(kv[0, 1, 0, 4:9], k)
    assert torch.equal(kv[0, 1, 1, 4:9], v)


def test_padding_rows_touch_only_the_dummy_block() -> None:
    kv = torch.zeros(1, 3, 2, 16, 2, 8)
    ones = torch.ones(4, 2, 8)
    store_kv(ones, ones, kv[0], torch.tensor([0, 16, 0, 0]))
    assert int(kv[0, 1:].sum()) == 2 * 2 * 8
    assert torch.equal(kv[0, 1, :, 0], torch.ones(2, 2, 8))


def test_copy_blocks() -> None:
    torch.manual_seed(0)
    kv = random_pool()
    before = kv.clone()
    copy_blocks(kv, [(1, 2), (1, 5), (2, 3)])
    assert torch.equal(kv[:, [2, 5, 3]], before[:, [1, 1, 2]])
    untouched = [0, 1, 4, 6, 7, 8]
    assert torch.equal(kv[:, untouched], before[:, untouched])
    copy_blocks(kv, [])


def test_gather_then_scatter_moves_blocks_between_pools() -> None:
    torch.manual_seed(0)
    source, target = random_pool(), random_pool(num_blocks=20)
    before = target.clone()
    data = gather_blocks(source, range(1, 3), [7, 2, 5])
    assert data.is_contiguous()
    assert data.shape == (2, 3, 2, 16, 2, 8)
    assert torch.equal(data, torch.stack([source[1:3, 7], source[1:3, 2], source[1:3, 5]], 1))
    source.zero_()
    scatter_blocks(target, range(1, 3), [19, 1, 6], data)
    assert torch.equal(target[1:3, [19, 1, 6]], data)
    untouched = [i for i in range(20) if i not in (19, 1, 6)]
    assert torch.equal(target[:, untouched], before[:, untouched])
    assert torch.equal(target[0], before[0])


def test_moving_no_blocks() -> None:
    kv = random_pool()
    before = kv.clone()
    data = gather_blocks(kv, range(0, 3), [])
    assert data.shape == (3, 0, 2, 16, 2, 8)
    scatter_blocks(kv, range(0, 3), [], data)
    assert torch.equal(kv, before)


def test_wrong_data_is_refused() -> None:
    kv = random_pool()
    data = gather_blocks(kv, range(0, 2), [1, 2])
    with pytest.raises(ValueError, match="data is"):
        scatter_blocks(kv, range(0, 2), [1, 2, 3], data)
    with pytest.raises(ValueError, match="data is"):
        scatter_blocks(kv, range(0, 2), [1, 2], data.to(torch.bfloat16))
    with pytest.raises(ValueError, match="layers is"):
        gather_blocks(kv, range(2, 4), [1])
