"""The area for block ids never hands out a byte twice, slots do not overlap, and pieces cover a put exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdray.config import Config
from pdray.engine.kv.pool import KVPool
from pdray.errors import ConfigError
from pdray.kernels.kv.blocks import gather_blocks
from pdray.transfer.nccl.staging import (
    ID_AREA_BYTES,
    MAX_SPAN_BLOCKS,
    NUM_SLOTS,
    Staging,
    default_staging_bytes,
    split_put,
)
from pdray.transfer.ring import Ring


@given(st.data())
def test_ids_in_use_never_overlap(data: st.DataObject) -> None:
    area = Ring(512 * data.draw(st.integers(1, 20), "capacity"))
    live = []
    for _ in range(data.draw(st.integers(1, 60), "steps")):
        if live and data.draw(st.booleans(), "free"):
            area.free(live.pop(data.draw(st.integers(0, len(live) - 1), "which")))
        else:
            ids = area.allocate(data.draw(st.integers(1, area.capacity), "size"))
            assert ids is not None or live, "an empty area has room"
            if ids is not None:
                live.append(ids)
        spans = sorted((r.offset, r.offset + r.num_bytes) for r in live)
        assert all(0 <= start < end <= area.capacity for start, end in spans)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        assert len(area) == len(live)


def test_an_area_in_order_is_used_to_the_last_byte() -> None:
    area = Ring(4 * 512)
    parts = [area.allocate(512) for _ in range(4)]
    assert area.allocate(1) is None
    for _ in range(10):
        area.free(parts.pop(0))  # type: ignore[arg-type]
        parts.append(area.allocate(512))
        assert None not in parts and area.allocate(1) is None


@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 30), st.integers(1, 200))
def test_pieces_cover_a_put_once(first: int, num_layers: int, num_blocks: int, block_bytes: int, limit: int) -> None:
    limit = max(limit, block_bytes)
    layers = range(first, first + num_layers)
    spans = split_put(layers, num_blocks, block_bytes, limit)
    pieces = [piece for span in spans for piece in span.pieces]
    assert [block for span in spans for block in range(span.start, span.stop)] == list(range(num_blocks))
    assert all(span.start <= p.start < p.stop <= span.stop for span in spans for p in span.pieces)
    covered = [(layer, block) for p in pieces for layer in p.layers for block in range(p.start, p.stop)]
    assert sorted(covered) == [(layer, block) for layer in layers for block in range(num_blocks)]
    assert all(len(p.layers) * (p.stop - p.start) * block_bytes <= limit for p in pieces)
    assert all(span.stop - span.start <= MAX_SPAN_BLOCKS for span in spans)
    full = num_layers * num_blocks * block_bytes <= limit
    assert not full or len(pieces) == 1, "what fits at once goes at once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_is_what_gather_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    source, target = torch.randn(5, 12, 2, 4, 2, 8).to(dtype), torch.zeros(5, 12, 2, 4, 2, 8, dtype=dtype)
    sender, receiver = (Staging(KVPool.of(pool), torch.zeros(400_000, dtype=torch.uint8)) for pool in (source, target))
    blocks, destination = [7, 2, 11, 5], [1, 10, 3, 6]
    for span in split_put(range(1, 4), 4, sender.bytes_per_block, 3 * sender.bytes_per_block):
        ids = sender.allocate_ids(span), receiver.allocate_ids(span)
        assert ids[0] is not None and ids[1] is not None
        sender.load_ids(ids[0], span, blocks)
        receiver.load_ids(ids[1], span, destination)
        for piece in span.pieces:
            here, there = sender.next_slot(), receiver.next_slot()
            sender.pack(here, piece, span, ids[0])
            num_bytes = sender.num_bytes(piece)
            receiver.buffer[there.offset :][:num_bytes] = sender.buffer[here.offset :][:num_bytes]
            receiver.unpack(there, piece, span, ids[1])
    assert torch.equal(target[1:4, destination], gather_blocks(source, range(1, 4), blocks))
    others = [block for block in range(12) if block not in destination]
    assert not target[:, others].any() and not target[[0, 4]].any()


def test_warming_up_changes_only_the_dummy_block() -> None:
    pool = torch.randn(5, 12, 2, 4, 2, 8)
    before = pool.clone()
    staging = Staging(KVPool.of(pool), torch.zeros(400_000, dtype=torch.uint8))
    staging.warm_up()
    assert torch.equal(pool, before) and len(staging.ids) == 0


def test_staging_grows_with_the_device_up_to_what_is_of_use() -> None:
    gib = 2**30
    assert default_staging_bytes(80 * gib, 1) == default_staging_bytes(80 * gib, 2) == 512 * 2**20
    assert default_staging_bytes(24 * gib, 1) == 384 * 2**20
    assert default_staging_bytes(8 * gib, 1) == default_staging_bytes(80 * gib, 100) == 128 * 2**20
    for num_channels in range(1, 9):
        assert num_channels * default_staging_bytes(80 * gib, num_channels) <= 80 * gib / 64
    assert Config().transfer_staging_bytes is None


def test_too_little_staging_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="transfer_staging_bytes is 1024"):
        Staging(KVPool.of(torch.zeros(5, 12, 2, 4, 2, 8)), torch.zeros(ID_AREA_BYTES + 1024, dtype=torch.uint8))


def test_probes_of_two_epochs_differ() -> None:
    staging = Staging(KVPool.of(torch.zeros(5, 12, 2, 4, 2, 8)), torch.zeros(400_000, dtype=torch.uint8))
    slot, row = staging.next_slot(), staging.next_probe()
    staging.write_probe(slot, 3)
    staging.read_probe(slot, row)
    assert staging.is_probe(row, 3) and not staging.is_probe(row, 4)


def test_slots_take_turns_and_do_not_overlap() -> None:
    staging = Staging(KVPool.of(torch.zeros(5, 12, 2, 4, 2, 8)), torch.zeros(400_000, dtype=torch.uint8))
    slots = [staging.next_slot() for _ in range(2 * NUM_SLOTS)]
    assert slots[:NUM_SLOTS] == slots[NUM_SLOTS:]
    starts = sorted(slot.offset for slot in slots[:NUM_SLOTS])
    ends = [*starts[1:], len(staging.buffer)]
    assert all(end - start >= staging.piece_bytes for start, end in zip(starts, ends, strict=True))
