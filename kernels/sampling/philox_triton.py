"""The Triton counterpart of philox.philox_uniform: the same bits."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)
INVERSE_2_32 = tl.constexpr(2.0**-32)
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def philox_uniform(seed, position, first_token_id, NUM: tl.constexpr):
    """[NUM] float32 for NUM token ids from first_token_id on, which must be a multiple of 4; see philox.py."""
    return _uniform(seed, position, first_token_id // 4 + tl.arange(0, NUM // 4), [NUM])


@triton.jit
def philox_uniform_groups(seed, position, first_token_ids, NUM: tl.constexpr, WIDTH: tl.constexpr):
    """[NUM, WIDTH] float32 for WIDTH token ids from each of [NUM] first ones on, which must be multiples of 4."""
    groups = first_token_ids[:, None] // 4 + tl.arange(0, WIDTH // 4)[None, :]
    return _uniform(seed, position, groups, [NUM, WIDTH])


@triton.jit
def _uniform(seed, position, group, SHAPE: tl.constexpr):
    """Numbers of the four token ids of each group, one group after the other."""
    group = group.to(tl.uint32)
    zero = group * 0
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    x0, x1, x2, x3 = tl.philox(seed, group, low, high, zero, 10)
    bits = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), SHAPE)  # x0, x1, x2, x3, then the next group's
    return tl.minimum((bits.to(tl.float32) + 0.5) * INVERSE_2_32, LARGEST_UNIFORM)


@triton.jit
def gumbel(uniform):
    """Standard Gumbel noise, -log(-log1p(-uniform)), of uniform in (0, 1)."""
    rest = 1.0 - uniform
    exponent = exponent_bits(rest)
    fraction = (rest.to(tl.int32, bitcast=True) - exponent).to(tl.float32, bitcast=True) - 1.0
    exponential = -log_of(exponent, tl.where(exponent == 0, -uniform, fraction))  # -uniform: not yet rounded
    exponent = exponent_bits(exponential)
    fraction = (exponential.to(tl.int32, bitcast=True) - exponent).to(tl.float32, bitcast=True) - 1.0
    return -log_of(exponent, fraction)


@triton.jit
def largest_gumbel(uniform):
    """Not below gumbel(uniform), nor more than 0.06 above where uniform is small; no logarithm.

    -log1p(-u) >= u, and log2(u) is not below the number that the exponent and the fraction of u make when read as one.
    """
    return (127.0 - uniform.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23) * LOG_2


@triton.jit
def exponent_bits(x):
    """The int32 to take from the bits of x > 0, normal, to bring it between 2/3 and 4/3: 2**23 times an exponent."""
    return (x.to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000  # 2/3


@triton.jit
def log_of(exponent, fraction):
    """log(2**(exponent * 2**-23) * (1 + fraction)), fraction between -1/3 and 1/3; to about one unit in the last place.

    A least-maximum polynomial for log(1 + x) = x - x**2 / 2 + x**3 * p(x).
    """
    square = fraction * fraction
    even = tl.fma(square, -0.130310059, -0.121483512)
    odd = tl.fma(square, 0.140869141, 0.139814854)
    even = tl.fma(even, square, -0.166846126)
    odd = tl.fma(odd, square, 0.200120345)
    even = tl.fma(even, square, -0.249996200)
    terms = tl.fma(odd, fraction, even)
    terms = tl.fma(terms, fraction, 0.333331972)
    terms = tl.fma(terms, fraction, -0.5)
    return tl.fma(exponent.to(tl.float32), LOG_2 * 2.0**-23, tl.fma(terms, square, fraction))
