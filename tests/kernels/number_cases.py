"""Checks of what the sampling kernels compute with: random numbers, and boundaries by number and by mass."""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from sampling_rows import DEVICE, DTYPES, POSITIONS, SEEDS

from pdray.kernels.sampling.late_draw_triton import find_threshold
from pdray.kernels.sampling.philox import philox_uniform
from pdray.kernels.sampling.philox_triton import gumbel as triton_gumbel
from pdray.kernels.sampling.philox_triton import largest_gumbel, philox_uniform_groups
from pdray.kernels.sampling.philox_triton import philox_uniform as triton_philox_uniform
from pdray.kernels.sampling.row_triton import load_raw_logits
from pdray.kernels.sampling.threshold_triton import KEY_SHIFT, find_in, to_key


@triton.jit
def uniform_kernel(seeds_ptr, positions_ptr, out_ptr, first, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    tl.store(out_ptr + row * NUM + tl.arange(0, NUM), triton_philox_uniform(seed, position, first, NUM))


@triton.jit
def group_uniform_kernel(seeds_ptr, positions_ptr, firsts_ptr, out_ptr, NUM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    lanes = tl.arange(0, NUM)
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    uniform = philox_uniform_groups(seed, position, tl.load(firsts_ptr + lanes), NUM, WIDTH)
    at = lanes[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out_ptr + row * NUM * WIDTH + at, uniform)


@triton.jit
def gumbel_kernel(uniform_ptr, out_ptr, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, NUM)
    uniform = tl.load(uniform_ptr + at)
    tl.store(out_ptr + at, triton_gumbel(uniform))
    tl.store(out_ptr + NUM + at, largest_gumbel(uniform))


@triton.jit
def threshold_kernel(
    logits_ptr, targets_ptr, ints_ptr, out_ptr, NUM: tl.constexpr, SHIFT: tl.constexpr, BY_MASS: tl.constexpr
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    row_ptr = logits_ptr + row * NUM
    x = load_raw_logits(row_ptr, tl.arange(0, 1024), tl.arange(0, 1024) < NUM)
    largest = tl.max(x, 0)
    low, high = to_key(largest * 0 + float("-inf"), SHIFT), to_key(largest, SHIFT) + 1
    target = tl.load(targets_ptr + row)
    zero = target * 0.0
    found = find_threshold(
        row_ptr, ints_ptr, ints_ptr, zero.to(tl.int32), zero + 1, zero, zero, low, high, target, largest, 1.0, SHIFT,
        NUM, 1024, BY_MASS,
    )  # fmt: skip
    tl.store(out_ptr + row * 2, found)
    weight = tl.full([1024], 1.0, tl.float32)
    if BY_MASS:
        weight = tl.exp2(x - largest)
    tl.store(out_ptr + row * 2 + 1, find_in(x, weight, low, high, target, SHIFT))


def check_uniform_bits() -> None:
    """Philox to the last bit, for keys and counters that fill both words, from any group on."""
    seeds, positions = SEEDS.to(DEVICE), POSITIONS.to(DEVICE)
    for first in (0, 1024):
        expected = philox_uniform(SEEDS, POSITIONS, first + 64)[:, first:]
        out = torch.empty(len(SEEDS), 64, device=DEVICE)
        uniform_kernel[(len(SEEDS),)](seeds, positions, out, first, NUM=64)
        assert torch.equal(out.cpu(), expected)
    firsts = torch.tensor([512, 0, 64, 1024])
    out = torch.empty(len(SEEDS), 4, 16, device=DEVICE)
    group_uniform_kernel[(len(SEEDS),)](seeds, positions, firsts.int().to(DEVICE), out, NUM=4, WIDTH=16)
    expected = philox_uniform(SEEDS, POSITIONS, 1040)[:, firsts[:, None] + torch.arange(16)]
    assert torch.equal(out.cpu(), expected)


def check_gumbel() -> None:
    """Against float64, from the smallest uniform number to the largest; and its upper bound is one, and close."""
    edges = torch.tensor([2.0**-33, 1.5 * 2**-32, 2.0**-25, 2.0**-24, 3 * 2.0**-25, 0.5, 1 - 2.0**-23, 1 - 2.0**-24])
    uniform = torch.cat((edges, torch.rand(1016), torch.logspace(-9.9, -0.01, 1024))).clamp(2.0**-33, 1 - 2.0**-24)
    out = torch.empty(2, 2048, device=DEVICE)
    gumbel_kernel[(1,)](uniform.to(DEVICE), out, NUM=2048)
    expected = -(-torch.log1p(-uniform.double())).log()
    torch.testing.assert_close(out[0].cpu().double(), expected, rtol=4e-7, atol=4e-7)
    assert bool((out[1] >= out[0] - 1e-5).all())
    small = uniform < 0.01
    assert bool((out[1].cpu()[small] <= out[0].cpu()[small] + 0.07).all())


def check_thresholds() -> None:
    """The k-th largest of rows of both signs, with equals, to the last bit; and where a mass crosses, in exact sums."""
    num, vocab_size = 12, 1000
    ks = torch.tensor([1, 2, 3, 4, 7, 10, 50, 100, 500, 640, 999, 1000])
    ints = torch.zeros(1, dtype=torch.int32, device=DEVICE)  # no history, no mask
    for dtype in DTYPES:
        logits = (torch.randn(num, vocab_size) * 3).to(dtype)
        logits[:, 7] = 0.0
        logits[1::2, 100:300] = logits[1::2, 300:500]
        moved, shift = logits.to(DEVICE), KEY_SHIFT[dtype]
        out = torch.empty(num, 2, device=DEVICE)
        threshold_kernel[(num,)](moved, ks.float().to(DEVICE), ints, out, NUM=vocab_size, SHIFT=shift, BY_MASS=False)
        expected = logits.float().sort(-1, descending=True).values.gather(1, ks[:, None] - 1)
        assert torch.equal(out.cpu(), expected.expand(-1, 2)), f"{dtype}: {out.cpu() - expected}"
        powers = torch.arange(vocab_size).remainder(4).neg().float()  # 250 each of 1, 1/2, 1/4 and 1/8: exact sums
        rows = powers.to(dtype).expand(4, -1).contiguous().to(DEVICE)
        masses = torch.tensor([250.0, 250.5, 375.0, 437.5], device=DEVICE)
        threshold_kernel[(4,)](rows, masses, ints, out, NUM=vocab_size, SHIFT=shift, BY_MASS=True)
        assert out[:4].tolist() == [[0.0, 0.0], [-1.0, -1.0], [-1.0, -1.0], [-2.0, -2.0]]


CHECKS = {"uniform bits": check_uniform_bits, "gumbel": check_gumbel, "thresholds": check_thresholds}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
