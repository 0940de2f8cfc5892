"""Checks of the sum over ranks by one kernel; see attention_cases.py.

Ranks run one after the other, in one process: what those behind one would send it lies in its inbox already. On two
GPUs tests/gpu/ranks.py runs the same at once.
"""

from __future__ import annotations

import os
import sys

import torch

from pdray.kernels.collective.one_shot_triton import WORDS, inbox_packets, triton_one_shot_sum

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts bfloat16 off.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2 if INTERPRETED else 4e-3}
PROGRAMS = 3


class Ranks:
    """Their memory. Each has inboxes for what the others send."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.inboxes = [torch.zeros(inbox_packets(size, PROGRAMS), dtype=torch.int64) for _ in range(size)]
        self.inboxes = [inbox.to(DEVICE) for inbox in self.inboxes]
        self.addresses = torch.tensor([inbox.data_ptr() for inbox in self.inboxes], device=DEVICE)
        self.turns = [torch.zeros(PROGRAMS, dtype=torch.int32, device=DEVICE) for _ in range(size)]

    def send(self, part: torch.Tensor, source: int, target: int) -> None:
        """By hand, as the next turn of the source."""
        words = part.view(torch.int32).long() & 0xFFFFFFFF
        for program, piece in enumerate(words.split(WORDS)):
            turn = int(self.turns[source][program]) + 1
            place = ((source * PROGRAMS + program) * 2 + turn % 2) * WORDS
            packets = torch.zeros(WORDS, dtype=torch.int64, device=DEVICE)
            packets[: len(piece)] = piece
            self.inboxes[target][place : place + WORDS] = packets | turn << 32

    def sum(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """What each rank gets."""
        for source in range(self.size):
            for target in range(source):
                self.send(parts[source], source, target)
        results = [part.clone() for part in parts]
        for rank, result in enumerate(results):
            triton_one_shot_sum(result, self.addresses, self.turns[rank], rank)
        return results


def check_sums(size: int, dtype: torch.dtype) -> None:
    """Of many sizes, one after the other: inboxes are used again, and programs that had no turn have fewer."""
    ranks, per_word = Ranks(size), 4 // dtype.itemsize
    for number, words in enumerate((3 * WORDS, 1, 2 * WORDS - 3, WORDS, 3 * WORDS, 5)):
        torch.manual_seed(number)
        parts = [torch.randn(words * per_word).to(dtype).to(DEVICE) for _ in range(size)]
        results = ranks.sum(parts)
        expected = torch.stack(parts).float().sum(0)
        for result in results:
            assert torch.equal(result, results[0]), "ranks have other bits"
            torch.testing.assert_close(result.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert [turns.tolist() for turns in ranks.turns] == [[6, 3, 2]] * size


CHECKS = {
    f"sum of {size} ranks, {dtype}": lambda size=size, dtype=dtype: check_sums(size, dtype)
    for size, dtype in ((2, torch.bfloat16), (2, torch.float16), (3, torch.float32), (4, torch.bfloat16))
}

if __name__ == "__main__":
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
