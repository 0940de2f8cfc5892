"""The staging ring never hands out a byte twice, and pieces cover a put exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdray.engine.kv.pool import KVPool
from pdray.errors import ConfigError
from pdray.kernels.kv.blocks import gather_blocks
from pdray.transfer.nccl.staging import MAX_PIECE_BLOCKS, Staging, StagingRing, split_put


@given(st.data())
def test_regions_in_use_never_overlap(data: st.DataObject) -> None:
    ring = StagingRing(512 * data.draw(st.integers(1, 20), "capacity"))
    live = []
    for _ in range(data.draw(st.integers(1, 60), "steps")):
        if live and data.draw(st.booleans(), "free"):
            ring.free(live.pop(data.draw(st.integers(0, len(live) - 1), "which")))
        else:
            region = ring.allocate(data.draw(st.integers(1, ring.capacity), "size"))
            assert region is not None or live, "an empty ring has room"
            if region is not None:
                live.append(region)
        spans = sorted((r.offset, r.offset + r.num_bytes) for r in live)
        assert all(0 <= start < end <= ring.capacity for start, end in spans)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        assert len(ring) == len(live)


def test_a_ring_in_order_is_used_to_the_last_byte() -> None:
    ring = StagingRing(4 * 512)
    regions = [ring.allocate(512) for _ in range(4)]
    assert ring.allocate(1) is None
    for _ in range(10):
        ring.free(regions.pop(0))  # type: ignore[arg-type]
        regions.append(ring.allocate(512))
        assert None not in regions and ring.allocate(1) is None


@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 30), st.integers(1, 200))
def test_pieces_cover_a_put_once(first: int, num_layers: int, num_blocks: int, block_bytes: int, limit: int) -> None:
    limit = max(limit, block_bytes)
    layers = range(first, first + num_layers)
    pieces = split_put(layers, num_blocks, block_bytes, limit)
    covered = [(layer, block) for p in pieces for layer in p.layers for block in range(p.start, p.stop)]
    assert sorted(covered) == [(layer, block) for layer in layers for block in range(num_blocks)]
    assert all(len(p.layers) * (p.stop - p.start) * block_bytes <= limit for p in pieces)
    assert all(p.stop - p.start <= MAX_PIECE_BLOCKS for p in pieces)
    full = num_layers * num_blocks * block_bytes <= limit
    assert not full or len(pieces) == 1, "what fits at once goes at once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_is_what_gather_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    source, target = torch.randn(5, 12, 2, 4, 2, 8).to(dtype), torch.zeros(5, 12, 2, 4, 2, 8, dtype=dtype)
    sender, receiver = (Staging(KVPool.of(pool), torch.zeros(400_000, dtype=torch.uint8)) for pool in (source, target))
    blocks, destination = [7, 2, 11, 5], [1, 10, 3, 6]
    for piece in split_put(range(1, 4), 4, sender.bytes_per_block, 3 * sender.bytes_per_block):
        here, there = sender.allocate(piece), receiver.allocate(piece)
        assert here is not None and there is not None
        sender.pack(here, piece, blocks)
        receiver.buffer[there.offset :][: there.num_bytes] = sender.buffer[here.offset :][: here.num_bytes]
        receiver.unpack(there, piece, destination)
    assert torch.equal(target[1:4, destination], gather_blocks(source, range(1, 4), blocks))
    others = [block for block in range(12) if block not in destination]
    assert not target[:, others].any() and not target[[0, 4]].any()


def test_warming_up_changes_only_the_dummy_block() -> None:
    pool = torch.randn(5, 12, 2, 4, 2, 8)
    before = pool.clone()
    staging = Staging(KVPool.of(pool), torch.zeros(400_000, dtype=torch.uint8))
    staging.warm_up()
    assert torch.equal(pool, before) and len(staging.ring) == 0


def test_too_little_staging_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="transfer_staging_bytes is 1024"):
        Staging(KVPool.of(torch.zeros(5, 12, 2, 4, 2, 8)), torch.zeros(1024, dtype=torch.uint8))


def test_probes_of_two_epochs_differ() -> None:
    staging = Staging(KVPool.of(torch.zeros(5, 12, 2, 4, 2, 8)), torch.zeros(400_000, dtype=torch.uint8))
    region = staging.allocate_probe()
    assert region is not None
    staging.write_probe(region, 3)
    assert staging.is_probe(region, 3) and not staging.is_probe(region, 4)
