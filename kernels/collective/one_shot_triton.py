"""The sum of a small tensor over ranks whose memory each can write, in one kernel and one trip over the link.

Every rank writes its part into an inbox of every other rank, in packets of eight bytes: four of data, four that say
which turn they belong to. A packet arrives whole, so that whoever finds the turn it waits for has the data: no fence,
and no barrier between the ranks. The protocol is that of NCCL's LL (low latency) mode; here it is one kernel without
any other work, and the ranks' parts are added in the same order on each.

Two inboxes take turns. A rank writes into one again only after the turn between, for which it needed what every other
rank sent in that turn: after they had read the turn before.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 1024  # of 4 bytes, that one program adds up
NUM_WARPS = 8
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def inbox_packets(size: int, max_programs: int) -> int:
    """Packets, of 8 bytes, of one rank's inboxes: two for each rank and program."""
    return size * max_programs * 2 * WORDS


@triton.jit
def _number(half, DTYPE: tl.constexpr):
    """Half a word as a number of two bytes."""
    return (half & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _half(number, DTYPE: tl.constexpr):
    """Inverse of _number()."""
    return number.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit(do_not_specialize=["num_words"])
def sum_kernel(
    words_ptr,
    inboxes_ptr,  # [SIZE] int64: addresses of the ranks' inboxes, as this rank can write them
    turns_ptr,  # [PROGRAMS] int32: turns that each program has had; zeros at first
    num_words,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    HALVES: tl.constexpr,  # two numbers in a word
):
    program = tl.program_id(0)
    turn = tl.load(turns_ptr + program) + 1
    offsets = tl.arange(0, WORDS)
    word = program * WORDS + offsets
    mask = word < num_words
    own = tl.load(words_ptr + word, mask=mask, other=0)
    place = (program * 2 + turn % 2) * WORDS + offsets
    ALL: tl.constexpr = PROGRAMS * 2 * WORDS
    sent = (turn.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            theirs = tl.multiple_of(tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.int64)), 16)
            tl.store(theirs + RANK * ALL + place, sent, cache_modifier=".wt")
    mine = tl.multiple_of(tl.load(inboxes_ptr + RANK).to(tl.pointer_type(tl.int64)), 16)
    low = tl.zeros([WORDS], tl.float32)
    high = tl.zeros([WORDS], tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            part = own
        else:
            packet = tl.load(mine + rank * ALL + place, volatile=True)
            while tl.sum(((packet >> 32) != turn).to(tl.int32), 0) > 0:
                packet = tl.load(mine + rank * ALL + place, volatile=True)
            part = packet.to(tl.int32)
        if HALVES:
            low += _number(part, DTYPE)
            high += _number(part >> 16, DTYPE)
        else:
            low += part.to(tl.float32, bitcast=True)
    if HALVES:
        tl.store(words_ptr + word, _half(low, DTYPE) | (_half(high, DTYPE) << 16), mask=mask)
    else:
        tl.store(words_ptr + word, low.to(tl.int32, bitcast=True), mask=mask)
    tl.store(turns_ptr + program, turn)


def triton_one_shot_sum(x: Tensor, inboxes: Tensor, turns: Tensor, rank: int) -> None:
    """Overwrite ``x`` with the sum over all ranks, on the current stream; all launch it with as many bytes.

    Args:
        x: contiguous, of whole words, no more than len(turns) programs' (see max_bytes()).
        inboxes: [size] int64, addresses of inboxes of inbox_packets(), which begin as zeros.
        turns: [max_programs] int32, this rank's alone, zeros at first.
    """
    words = x.view(-1).view(torch.int32)
    sum_kernel[(triton.cdiv(words.numel(), WORDS),)](
        words, inboxes, turns, words.numel(),
        RANK=rank, SIZE=len(inboxes), PROGRAMS=len(turns), WORDS=WORDS,
        DTYPE=TYPES[x.dtype], HALVES=x.element_size() == 2, num_warps=NUM_WARPS,
    )  # fmt: skip
