"""Checks of the write into a peer's pool against its torch reference; see attention_cases.py."""

from __future__ import annotations

import itertools
import os
import random
import sys

import torch

from pdray.kernels.kv.peer_write import HeadMove, PeerBlocks, write_peer_blocks
from pdray.kernels.kv.peer_write_triton import MAX_PIECE, triton_write_peer_blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = {  # heads, head_dim, dtype: what a block's words make of the kernel's pieces
    "a part of a piece": (3, 64, torch.float16),
    "one piece": (8, 64, torch.float16),
    "pieces and a part": (12, 128, torch.float32),
}


def check_words(name: str) -> None:
    """Blocks of some layers land where they should, and nothing else changes, whatever the number of programs."""
    heads, head_dim, dtype = SHAPES[name]
    rng = random.Random(name)
    for num_programs, (first, last) in itertools.product((None, 1, 5), ((0, 3), (1, 2))):
        source = torch.randn(3, 9, 2, 16, heads, head_dim).to(dtype)
        target = torch.randn(3, 14, 2, 16, heads, head_dim).to(dtype)
        count = rng.choice([1, 4])
        ids = torch.tensor([rng.sample(range(1, 9), count), rng.sample(range(1, 14), count)], dtype=torch.int32)
        expected = target.clone()
        write_peer_blocks(source, range(first, last), ids, PeerBlocks(expected.data_ptr(), 14))
        by_hand = target.clone()
        for layer, (a, b) in itertools.product(range(first, last), ids.T.tolist()):
            by_hand[layer, b] = source[layer, a]
        assert torch.equal(expected, by_hand), f"the reference, {num_programs}"
        pool, mine = source.to(DEVICE), target.to(DEVICE)
        peer = PeerBlocks(mine.data_ptr(), 14)
        triton_write_peer_blocks(pool, range(first, last), ids.to(DEVICE), peer, num_programs)
        assert torch.equal(mine.cpu(), expected), f"{num_programs} programs, layers {first} to {last}, {count} blocks"


MOVES = {  # heads of the pool, where they come from and go to, head_dim, dtype
    "to a rank of two": (4, HeadMove(2, 0, 2, 2), 64, torch.float16),
    "from a rank of two": (2, HeadMove(0, 2, 2, 4), 96, torch.float32),
    "one of three": (3, HeadMove(1, 0, 1, 1), 32, torch.bfloat16),
    "to a larger pool, into its midst": (2, HeadMove(1, 3, 1, 8), 128, torch.float16),
}


def check_heads(name: str) -> None:
    """Some heads of blocks land where they should, and the other heads stay as they were."""
    heads, move, head_dim, dtype = MOVES[name]
    rng = random.Random(name)
    for num_programs, (first, last) in ((None, (0, 3)), (3, (1, 2))):
        source = torch.randn(3, 9, 2, 16, heads, head_dim).to(dtype)
        target = torch.randn(3, 14, 2, 16, move.num_targets, head_dim).to(dtype)
        ids = torch.tensor([rng.sample(range(1, 9), 3), rng.sample(range(1, 14), 3)], dtype=torch.int32)
        expected, by_hand = target.clone(), target.clone()
        write_peer_blocks(source, range(first, last), ids, PeerBlocks(expected.data_ptr(), 14, move))
        for layer, (a, b), head in itertools.product(range(first, last), ids.T.tolist(), range(move.num_heads)):
            by_hand[layer, b, :, :, move.target + head] = source[layer, a, :, :, move.source + head]
        assert torch.equal(expected, by_hand), f"the reference, {num_programs}"
        pool, mine = source.to(DEVICE), target.to(DEVICE)
        peer = PeerBlocks(mine.data_ptr(), 14, move)
        triton_write_peer_blocks(pool, range(first, last), ids.to(DEVICE), peer, num_programs)
        assert torch.equal(mine.cpu(), expected), f"{num_programs} programs, layers {first} to {last}"


CHECKS = {f"peer write, {name}": lambda name=name: check_words(name) for name in SHAPES}
CHECKS |= {f"peer write, heads {name}": lambda name=name: check_heads(name) for name in MOVES}
assert MAX_PIECE == 2 * 16 * 8 * 64 * 2 // 8

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
