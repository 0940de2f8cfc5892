"""The Triton counterpart of write_peer_blocks: programs that share the pieces of all blocks among them."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.kv.peer_write import WORD_BYTES, HeadMove, PeerBlocks

MAX_PIECE = 4096  # words that a program moves at once: 8 loads of 16 bytes for each of its threads
NUM_WARPS = 8


class Rows(NamedTuple):
    """Words that move of a block, and of each of its rows, of how many words that is in either pool, and how many of
    them come first."""

    words: int
    run: int
    source_row: int
    target_row: int
    source_skip: int
    target_skip: int


def rows_of(kv: Tensor, heads: HeadMove | None) -> Rows:
    """A block without heads to choose is one row; else keys and values of each of its tokens are."""
    block_words = kv[0, 0].numel() * kv.element_size() // WORD_BYTES
    if heads is None or (heads.num_heads == kv.shape[-2] == heads.num_targets):
        return Rows(block_words, block_words, block_words, block_words, 0, 0)
    head = kv.shape[-1] * kv.element_size() // WORD_BYTES
    num_rows = block_words // (kv.shape[-2] * head)
    run = heads.num_heads * head
    skips = heads.source * head, heads.target * head
    return Rows(num_rows * run, run, kv.shape[-2] * head, heads.num_targets * head, *skips)


@triton.jit(do_not_specialize=["num_ids", "num_source_blocks", "num_target_blocks", "num_pieces"])
def write_kernel(
    source_ptr,
    target_address,
    block_ids_ptr,
    num_ids,
    num_source_blocks,
    num_target_blocks,
    num_pieces,
    WORDS: tl.constexpr,  # that move of a block: of all its rows
    RUN: tl.constexpr,  # that move of a row
    SOURCE_ROW: tl.constexpr,  # of a row in either pool; the rows of a block lie one after the other
    TARGET_ROW: tl.constexpr,
    SOURCE_SKIP: tl.constexpr,  # of a row, before those that move
    TARGET_SKIP: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Words [piece * PIECE, ...) of block i of one layer; i and the layer are counted from the first one to move."""
    ROWS: tl.constexpr = WORDS // RUN
    PIECES: tl.constexpr = (WORDS + PIECE - 1) // PIECE
    target_ptr = tl.multiple_of(target_address.to(tl.pointer_type(tl.int64)), 16)
    for number in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        piece = number % PIECES
        i = number // PIECES % num_ids
        layer = (number // PIECES // num_ids).to(tl.int64)
        source = tl.load(block_ids_ptr + i).to(tl.int64)
        target = tl.load(block_ids_ptr + num_ids + i).to(tl.int64)
        word = piece * PIECE + tl.arange(0, PIECE)
        mask = word < WORDS
        if ROWS == 1:
            source_word = word
            target_word = word
        else:
            source_word = word // RUN * SOURCE_ROW + SOURCE_SKIP + word % RUN
            target_word = word // RUN * TARGET_ROW + TARGET_SKIP + word % RUN
        from_block = source_ptr + (layer * num_source_blocks + source) * (ROWS * SOURCE_ROW)
        to_block = target_ptr + (layer * num_target_blocks + target) * (ROWS * TARGET_ROW)
        tl.store(to_block + target_word, tl.load(from_block + source_word, mask=mask), mask=mask)


def triton_write_peer_blocks(
    kv: Tensor, layers: range, block_ids: Tensor, peer: PeerBlocks, num_programs: int | None
) -> None:
    """See write_peer_blocks()."""
    num_ids = block_ids.shape[1]
    words = kv.view(torch.uint8).view(torch.int64)[layers.start :]
    rows = rows_of(kv, peer.heads)
    piece = min(MAX_PIECE, triton.next_power_of_2(rows.words))
    num_pieces = triton.cdiv(rows.words, piece) * num_ids * len(layers)
    skipped = layers.start * peer.num_blocks * (rows.words // rows.run) * rows.target_row * WORD_BYTES
    write_kernel[(min(num_pieces, num_programs or num_pieces),)](
        words, peer.address + skipped, block_ids, num_ids, kv.shape[1], peer.num_blocks, num_pieces,
        *rows, piece, num_warps=NUM_WARPS,
    )  # fmt: skip
