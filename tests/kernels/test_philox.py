"""Philox4x32-10 against Random123's published answers, a plain loop, and the claims of philox_uniform."""

from __future__ import annotations

import pytest
import torch

from pdray.kernels.sampling.philox import Words, _to_uniform, philox4x32, philox_uniform, philox_uniform_at

# Random123 1.14, tests/kat_vectors: philox4x32 10, counter, key, result.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """The round of the paper, figure 2, with Python's integers."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        high0, low0 = divmod(x0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(x2 * 0xCD9E8D57, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    words = philox4x32(Words(*(torch.tensor([word]) for word in counter)), *(torch.tensor([word]) for word in key))
    assert tuple(int(word) for word in words) == answer
    assert scalar_philox(counter, key) == answer


def test_uniform_layout() -> None:
    """Key, counter and word of every (seed, position, token id), with both halves of seed and position in use."""
    seeds = [0, 1, 2**63 - 1, 0x123456789ABCDEF, -1, -(2**63)]
    positions = [0, 5, 2**40 + 3, 77, 9, 1]
    vocab_size = 37
    uniform = philox_uniform(torch.tensor(seeds), torch.tensor(positions), vocab_size)
    assert uniform.shape == (6, vocab_size)
    assert uniform.dtype == torch.float32
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for token_id in range(vocab_size):
            counter = (token_id // 4, position % 2**32, position >> 32, 0)
            word = scalar_philox(counter, (seed % 2**32, (seed >> 32) % 2**32))[token_id % 4]
            assert float(uniform[row, token_id]) == pytest.approx((word + 0.5) / 2**32, rel=2**-23, abs=0)


def test_single_draws_equal_whole_rows() -> None:
    seeds, positions = torch.tensor([3, 9]), torch.tensor([0, 2**33])
    whole = philox_uniform(seeds, positions, 1003)
    rows = torch.tensor([1, 0, 1, 1, 0])
    token_ids = torch.tensor([0, 1002, 777, 3, 4])
    assert torch.equal(philox_uniform_at(seeds[rows], positions[rows], token_ids), whole[rows, token_ids])


def test_uniform_is_never_0_or_1() -> None:
    extremes = _to_uniform(torch.tensor([0, 1, 2**32 - 129, 2**32 - 1]))
    assert extremes.tolist() == [2**-33, 1.5 * 2**-32, 1 - 2**-24, 1 - 2**-24]


def test_uniform_is_uniform_and_rows_differ() -> None:
    uniform = philox_uniform(torch.arange(50), torch.arange(50) * 7, 2000).to(torch.float64)
    counts = torch.histc(uniform, 100, 0, 1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 99 + 4 * (2 * 99) ** 0.5
    correlation = torch.corrcoef(uniform) - torch.eye(50)
    assert float(correlation.abs().max()) < 5 / 2000**0.5


def test_a_row_does_not_depend_on_the_batch() -> None:
    seeds = torch.arange(9) * 2**35
    positions = torch.arange(9) * 3
    together = philox_uniform(seeds, positions, 999)
    for row in range(9):
        alone = philox_uniform(seeds[row : row + 1], positions[row : row + 1], 999)
        assert torch.equal(alone[0], together[row])
