"""The Triton counterpart of write_peer_blocks: programs that share the pieces of all blocks among them."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.kv.peer_write import PeerBlocks

WORD_BYTES = 8
MAX_PIECE = 4096  # words that a program moves at once: 8 loads of 16 bytes for each of its threads
NUM_WARPS = 8


@triton.jit(do_not_specialize=["num_ids", "num_source_blocks", "num_target_blocks", "num_pieces"])
def write_kernel(
    source_ptr,
    target_address,
    block_ids_ptr,
    num_ids,
    num_source_blocks,
    num_target_blocks,
    num_pieces,
    WORDS: tl.constexpr,  # of a block
    PIECE: tl.constexpr,
):
    """Words [piece * PIECE, ...) of block i of one layer; i and the layer are counted from the first one to move."""
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
        data = tl.load(source_ptr + (layer * num_source_blocks + source) * WORDS + word, mask=mask)
        tl.store(target_ptr + (layer * num_target_blocks + target) * WORDS + word, data, mask=mask)


def triton_write_peer_blocks(
    kv: Tensor, layers: range, block_ids: Tensor, peer: PeerBlocks, num_programs: int | None
) -> None:
    """See write_peer_blocks()."""
    num_ids = block_ids.shape[1]
    words = kv.view(torch.uint8).view(torch.int64)[layers.start :]
    num_words = words[0, 0].numel()
    piece = min(MAX_PIECE, triton.next_power_of_2(num_words))
    num_pieces = triton.cdiv(num_words, piece) * num_ids * len(layers)
    skipped = layers.start * peer.num_blocks * num_words * WORD_BYTES
    write_kernel[(min(num_pieces, num_programs or num_pieces),)](
        words, peer.address + skipped, block_ids, num_ids, kv.shape[1], peer.num_blocks, num_pieces,
        WORDS=num_words, PIECE=piece, num_warps=NUM_WARPS,
    )  # fmt: skip
