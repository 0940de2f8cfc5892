"""Checks of the fused kernels around the matrix products, and of sampling; see attention_cases.py."""

from __future__ import annotations

import itertools
import os
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.attention.rotary_store import rotate_and_store
from pdray.kernels.attention.rotary_store_triton import triton_rotate_and_store
from pdray.kernels.elementwise.activation import silu_and_mul
from pdray.kernels.elementwise.activation_triton import triton_silu_and_mul
from pdray.kernels.elementwise.embedding import embed
from pdray.kernels.elementwise.embedding_triton import triton_embed
from pdray.kernels.sampling.draw import draw, draw_filtered, gumbel
from pdray.kernels.sampling.draw_triton import triton_draw_tokens
from pdray.kernels.sampling.filtered_draw_triton import (
    KEY_SHIFT,
    find_threshold,
    load_tile,
    to_key,
    triton_draw_filtered,
)
from pdray.kernels.sampling.metadata import RandomRows
from pdray.kernels.sampling.philox import philox_uniform
from pdray.kernels.sampling.philox_triton import gumbel as triton_gumbel
from pdray.kernels.sampling.philox_triton import largest_gumbel
from pdray.kernels.sampling.philox_triton import philox_uniform as triton_philox_uniform
from pdray.kernels.sampling.sample import SamplingMetadata, SamplingRow, sample
from pdray.sampling_params import SamplingParams

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter rounds float32 to bfloat16 towards zero.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SEEDS = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, 0x1234567890ABCDEF, -1, -(2**63)])
POSITIONS = torch.tensor([0, 5, 2**31, 2**32 - 1, 2**32 + 9, 2**45, 7, 2**40])
NAN, INF = float("nan"), float("inf")


def assert_nearly_equal(out: Tensor, expected: Tensor, case: str) -> None:
    """Equal but for single roundings that the order of a float32 sum, or a fused multiply-add, turns over."""
    assert out.dtype == expected.dtype and out.shape == expected.shape, case
    out, expected = out.cpu(), expected.cpu()
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {text}")
    if expected.dtype != torch.float32:
        share = float((out != expected).float().mean()) if out.numel() else 0.0
        assert share < 0.01, f"{case}: {share:.1%} differ"


def check_rotate_and_store() -> None:
    """Queries and the whole KV layer, untouched slots too, against the torch composition; any head width."""
    head_shapes = [(4, 2, 64), (3, 1, 80), (2, 2, 96), (5, 1, 128), (16, 8, 128)]
    for (num_heads, num_kv_heads, head_dim), has_norm, dtype in itertools.product(head_shapes, (False, True), DTYPES):
        for num_tokens in (1, 5):
            qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
            norms = [(torch.rand(head_dim) + 0.5).to(dtype) if has_norm else None for _ in range(2)]
            angles = torch.randn(50, head_dim // 2)
            positions = torch.randint(50, (num_tokens,))
            kv_layer = torch.randn(4, 2, 16, num_kv_heads, head_dim).to(dtype)
            slots = torch.randperm(64)[:num_tokens]
            stored, expected_stored = kv_layer.to(DEVICE), kv_layer.clone()
            rest = [1e-6, angles.cos(), angles.sin(), positions]
            expected = torch.cat(rotate_and_store(qkv, *norms, *rest, expected_stored, slots, num_heads), dim=1)
            rotated = qkv.to(DEVICE, copy=True)
            arguments = (rotated, *norms, *rest, stored, slots, num_heads)
            triton_rotate_and_store(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments))
            case = f"{dtype}, heads {(num_heads, num_kv_heads, head_dim)}, norm {has_norm}, {num_tokens} tokens"
            assert_nearly_equal(rotated.view(expected.shape), expected, case)
            assert_nearly_equal(stored, expected_stored, case)
            untouched = torch.ones(64, dtype=torch.bool)
            untouched[slots] = False
            kept = stored.cpu().transpose(1, 2).flatten(0, 1)[untouched]
            assert torch.equal(kept, kv_layer.transpose(1, 2).flatten(0, 1)[untouched]), case
            values = qkv.view(num_tokens, -1, head_dim)[:, -num_kv_heads:]
            assert torch.equal(stored[slots // 16, 1, slots % 16].cpu(), values), case


def check_silu_and_mul() -> None:
    for dtype, (rows, width) in itertools.product(DTYPES, ((1, 1), (3, 96), (2, 3072), (5, 1030), (0, 64))):
        x = (torch.randn(rows, 2 * width) * 3).to(dtype)
        assert_nearly_equal(triton_silu_and_mul(x.to(DEVICE)), silu_and_mul(x), f"{dtype}, {rows} rows of {width}")
    large = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    assert triton_silu_and_mul(large.to(DEVICE)).tolist() == [[0.0, 200.0]]


def check_embed() -> None:
    for dtype, width in itertools.product(DTYPES, (64, 100)):
        table = torch.randn(30, width).to(dtype)
        ids, sampled = torch.tensor([3, -1, 29, -4, 0, -2]), torch.tensor([11, 0, 9, 29])
        out = triton_embed(*(x.to(DEVICE) for x in (ids, table, sampled))).cpu()
        assert torch.equal(out, table[[3, 11, 29, 29, 0, 0]])
        assert torch.equal(out, embed(ids, table, sampled))
        known = ids.clamp(min=0)
        out = triton_embed(known.to(DEVICE), table.to(DEVICE), sampled[:0].to(DEVICE)).cpu()
        assert torch.equal(out, embed(known, table, sampled[:0]))


@triton.jit
def uniform_kernel(seeds_ptr, positions_ptr, out_ptr, first, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    uniform = triton_philox_uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), first, NUM)
    tl.store(out_ptr + row * NUM + tl.arange(0, NUM), uniform)


@triton.jit
def gumbel_kernel(uniform_ptr, out_ptr, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, NUM)
    uniform = tl.load(uniform_ptr + at)
    tl.store(out_ptr + at, triton_gumbel(uniform))
    tl.store(out_ptr + NUM + at, largest_gumbel(uniform))


@triton.jit
def threshold_kernel(logits_ptr, targets_ptr, out_ptr, NUM: tl.constexpr, SHIFT: tl.constexpr, BY_MASS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    row_ptr = logits_ptr + row * NUM
    largest = tl.max(load_tile(row_ptr, 0, NUM, 1024), 0)
    low, high = to_key(largest * 0 + float("-inf"), SHIFT), to_key(largest, SHIFT) + 1
    target = tl.load(targets_ptr + row)
    found = find_threshold(row_ptr, low, high, target, largest, 1.0, NUM, 1024, SHIFT, BY_MASS)
    tl.store(out_ptr + row, found)


def check_uniform_bits() -> None:
    """Philox to the last bit, for keys and counters that fill both words, from any group on."""
    for first in (0, 1024):
        expected = philox_uniform(SEEDS, POSITIONS, first + 64)[:, first:]
        out = torch.empty(len(SEEDS), 64, device=DEVICE)
        uniform_kernel[(len(SEEDS),)](SEEDS.to(DEVICE), POSITIONS.to(DEVICE), out, first, NUM=64)
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


def assert_drawn(out: Tensor, logits: Tensor, random: RandomRows, temperature: Tensor, case: str) -> None:
    """The reference's tokens; another one only where its score is as good to within float32 rounding."""
    logits = logits.float()
    expected = torch.where(temperature > 0, draw(logits, random), logits.argmax(-1))
    for row in (out.cpu() != expected).nonzero()[:, 0].tolist():
        assert temperature[row] > 0, f"{case}: greedy row {row}: {out[row]} for {expected[row]}"
        assert 0 <= out[row] < logits.shape[1], f"{case}: row {row}: {out[row]}"
        seed, position = random.seeds[row : row + 1], random.positions[row : row + 1]
        noise = gumbel(philox_uniform(seed, position, logits.shape[1]).double())[0]
        scores = logits[row].double() / float(random.temperature[row]) + noise
        gap = float(scores[expected[row]] - scores[int(out[row])])
        assert abs(gap) < 2e-6 * float(scores[expected[row]].abs() + 1), f"{case}: row {row}: {gap}"


def random_rows(num: int, *filters: Tensor | None) -> tuple[RandomRows, Tensor]:
    """Rows of any temperature, every fifth greedy: for the reference (which takes 1 for 0), and the temperatures."""
    temperature = torch.tensor([0.0, 1.0, 0.3, 1.7, 1e-5]).repeat(num)[:num]
    seeds, positions = SEEDS.repeat(num)[:num], torch.randint(2**40, (num,))
    return RandomRows(
        torch.arange(num), temperature.where(temperature > 0, 1.0), seeds, positions, *filters
    ), temperature


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Peaked and flat rows; in the last three all equal, mostly banned, and both signs of zero."""
    logits = torch.randn(num_rows, vocab_size) * torch.rand(num_rows, 1) * 6
    if num_rows > 8:
        logits[-1] = -2.5
        logits[-2, 1:-1] = float("-inf")
        logits[-3] = torch.tensor([0.0, -0.0, -1.0])[torch.randint(3, (vocab_size,))]
    return logits.to(dtype)


def check_thresholds() -> None:
    """The k-th largest of rows of both signs, with equals, to the last bit; and where a mass crosses, in exact sums."""
    num, vocab_size = 12, 1000
    ks = torch.tensor([1, 2, 3, 4, 7, 10, 50, 100, 500, 640, 999, 1000])
    for dtype in DTYPES:
        logits = (torch.randn(num, vocab_size) * 3).to(dtype)
        logits[:, 7] = 0.0
        logits[1::2, 100:300] = logits[1::2, 300:500]
        moved, shift = logits.to(DEVICE), KEY_SHIFT[dtype]
        out = torch.empty(num, device=DEVICE)
        threshold_kernel[(num,)](moved, ks.float().to(DEVICE), out, NUM=vocab_size, SHIFT=shift, BY_MASS=False)
        expected = logits.float().sort(-1, descending=True).values.gather(1, ks[:, None] - 1)[:, 0]
        assert torch.equal(out.cpu(), expected), f"{dtype}: {out.cpu() - expected}"
        powers = torch.arange(vocab_size).remainder(4).neg().float()  # 250 each of 1, 1/2, 1/4 and 1/8: exact sums
        rows = powers.to(dtype).expand(4, -1).contiguous().to(DEVICE)
        masses = torch.tensor([250.0, 250.5, 375.0, 437.5], device=DEVICE)
        threshold_kernel[(4,)](rows, masses, out, NUM=vocab_size, SHIFT=shift, BY_MASS=True)
        assert out[:4].tolist() == [0.0, -1.0, -1.0, -2.0]


def check_draw() -> None:
    for dtype, vocab_size in itertools.product(DTYPES, (1, 37, 1030, 4999)):
        for num_rows, span in ((1, None), (13, None), (13, 2048)):
            logits = make_logits(num_rows, vocab_size, dtype)
            random, temperature = random_rows(num_rows)
            out = torch.full((num_rows,), -7, device=DEVICE)
            inputs = (x.to(DEVICE) for x in (logits, temperature, random.seeds, random.positions))
            triton_draw_tokens(*inputs, out, span)
            assert_drawn(out, logits, random, temperature, f"{dtype}, {num_rows} rows of {vocab_size}, span {span}")


def check_draw_ties() -> None:
    """The lowest id, whether the equals are in one tile, in one lane of two tiles, or in two programs."""
    logits = torch.zeros(3, 5000)
    for row, equals in enumerate(([4999, 3, 7], [1025, 1537], [4100, 1500])):
        logits[row, equals] = 2.0
    zeros = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for span in (1024, 2048, 8192):
        out = torch.empty_like(zeros)
        triton_draw_tokens(logits.to(DEVICE), torch.zeros(3, device=DEVICE), zeros, zeros, out, span)
        assert out.tolist() == [3, 1025, 1500]


def check_draw_filtered() -> None:
    """Each filter, their combinations, rows with and without them in one batch; every draw is the reference's."""
    num = 13 if INTERPRETED else 63
    min_p = torch.tensor([0.0, 0.05, 0.3, 1.0]).repeat(num)[:num]
    top_k = torch.tensor([0, 1, 5, 50, -1, 900, 10**6]).repeat(num)[:num]
    top_p = torch.tensor([1.0, 0.9, 0.5, 1e-6, 0.999, 0.3, 0.95, 0.7, 0.1]).repeat(num)[:num]
    shapes = [(37, num), (9000, 4)] if INTERPRETED else [(9000, num)]  # each takes a second to compile
    for dtype, used, (vocab_size, rows) in itertools.product(DTYPES, range(1, 8), shapes):
        filters = [f.roll(used)[:rows] if used >> i & 1 else None for i, f in enumerate((min_p, top_k, top_p))]
        logits = make_logits(rows, vocab_size, dtype)
        random, temperature = random_rows(rows, *filters)
        out = torch.full((rows,), -7, device=DEVICE)
        inputs = (logits, temperature, random.seeds, random.positions)
        moved = [None if f is None else f.to(DEVICE) for f in filters]
        triton_draw_filtered(*(x.to(DEVICE) for x in inputs), out, *moved)
        assert_drawn(out, logits, random, temperature, f"{dtype}, filters {used:03b}, {rows} rows of {vocab_size}")


def check_kept_set() -> None:
    """The set that stays, seen through many draws of one row: all of it and nothing else, and among equals the lowest.

    Five equal tokens of 0.16 each behind one of 0.2; a mass that needs two of them leaves the two lowest ids.
    """
    num_draws, equals = 30 if INTERPRETED else 60, [20, 1030, 3000, 4099, 4120]
    logits = torch.full((4200,), float("-inf"))
    logits[equals], logits[4150] = float(torch.tensor(0.16).log()), float(torch.tensor(0.2).log())
    for dtype in DTYPES[-1:]:
        for filters, expected in (
            ((None, None, 0.5), {4150, *equals[:2]}),
            ((None, None, 0.8), {4150, *equals[:4]}),
            ((None, 3, None), {4150, *equals}),
            ((None, 1, None), {4150}),
            ((0.3, None, None), {4150, *equals}),
            ((0.9, None, None), {4150}),
            ((None, 3, 0.25), {4150, equals[0]}),
        ):
            types = (torch.float32, torch.int64, torch.float32)
            limits = [
                None if f is None else torch.full((num_draws,), f, dtype=t, device=DEVICE)
                for f, t in zip(filters, types, strict=True)
            ]
            rows = logits.to(dtype).to(DEVICE).expand(num_draws, -1)
            positions = torch.arange(num_draws, device=DEVICE)
            out = torch.empty_like(positions)
            ones = torch.ones(num_draws, device=DEVICE)
            triton_draw_filtered(rows, ones, torch.full_like(positions, 9), positions, out, *limits)
            assert set(out.tolist()) == expected, f"{dtype}, {filters}: {sorted(set(out.tolist()))}"


def check_nothing_to_draw() -> None:
    """A row whose ids are all banned, or all not a number, still gives an id."""
    logits = torch.stack((torch.full((5000,), float("-inf")), torch.full((5000,), float("nan")))).to(DEVICE)
    ones, seeds = torch.ones(2, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for filters in ((None, None, None), (0.1 * ones, seeds + 3, 0.9 * ones)):
        out = torch.full_like(seeds, -7)
        triton_draw_filtered(logits, ones, seeds, seeds, out, *filters)
        assert out.tolist() == [0, 0]
    triton_draw_tokens(logits, ones, seeds, seeds, out)
    assert out.tolist() == [0, 0]


def check_hostile_numbers() -> None:
    """NaN, infinities, and parameters that nobody has checked: every row draws what the reference draws.

    Half of the rows are good ones, which must not notice.
    """
    num, vocab_size = 24, 1030 if INTERPRETED else 5000
    for dtype in DTYPES:
        logits = make_logits(num, vocab_size, dtype)
        rows = logits[::2]  # a view
        for i, filling in enumerate((NAN, INF, -INF, torch.finfo(dtype).max, torch.finfo(dtype).min)):
            rows[i] = filling
            rows[i + 5, i::3] = filling
        random, temperature = random_rows(num)
        temperature[::2] = torch.tensor([1.0, NAN, INF, 1e-39, 3e38, -1.0, 0.0, 1e-5, 1.0, 1.0, 1.0, 0.7])
        limits = (
            torch.tensor([7.0, NAN, -1.0, INF, 0.1, 0.0]),
            torch.tensor([-(2**63), 2**63 - 1, 3, 0, 2**40, 50]),
            torch.tensor([0.0, 0.9, -1.0, NAN, 1e-45, INF, 1e-30]),
        )
        for used in range(8):
            filters = [f.repeat(num)[:num] if used >> i & 1 else None for i, f in enumerate(limits)]
            out, expected = torch.full((num,), -7, device=DEVICE), torch.full((num,), -7)
            draw_filtered(logits, temperature, random.seeds, random.positions, expected, *filters)
            moved = [x.to(DEVICE) for x in (logits, temperature, random.seeds, random.positions)]
            if used:
                triton_draw_filtered(*moved, out, *(None if f is None else f.to(DEVICE) for f in filters))
            else:
                triton_draw_tokens(*moved, out)
            assert out.tolist() == expected.tolist(), f"{dtype}, filters {used:03b}: {out.tolist()} {expected.tolist()}"


def check_row_alone() -> None:
    """A row draws the same alone as in a batch."""
    logits = make_logits(12, 3000, torch.float32).to(DEVICE)
    random, temperature = random_rows(12, None, torch.full((12,), 40), torch.full((12,), 0.9))
    columns = [None if x is None else x.to(DEVICE) for x in (temperature, *random[2:])]
    temperature, seeds, positions, _, top_k, top_p = columns
    together, alone = torch.empty_like(seeds), torch.empty_like(seeds)
    triton_draw_filtered(logits, temperature, seeds, positions, together, None, top_k, top_p)
    for i in range(12):
        rows = [x[i : i + 1].clone() for x in (logits, temperature, seeds, positions, top_k, top_p)]
        triton_draw_filtered(*rows[:4], alone[i : i + 1], None, *rows[4:])
    assert torch.equal(together, alone)


def check_no_synchronisation() -> None:
    """sample() with everything at once makes the host wait for nothing, in the model's dtype. On CUDA."""
    rows = []
    for i in range(12):
        params = SamplingParams(
            temperature=(0.0, 0.8)[i % 2],
            top_k=(0, 20)[i % 3 == 0],
            top_p=(1.0, 0.9)[i % 4 == 1],
            min_p=0.01 * (i % 3),
            presence_penalty=0.5 * (i % 5 == 0),
            repetition_penalty=1.0 + 0.1 * (i % 2),
            logprobs=(None, 3)[i % 2],
        )
        rows.append(SamplingRow(params, i, i, (1, 2, 3), (4, 5, 5), (6,) if i % 4 == 0 else ()))
    logits = torch.randn(12, 5000).bfloat16()
    meta, moved = SamplingMetadata.build(rows, DEVICE), logits.to(DEVICE)
    plain = SamplingMetadata.build([row._replace(params=SamplingParams()) for row in rows[:5]], DEVICE)
    sample(moved, meta)
    sample(moved[:5], plain)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, plain_out = sample(moved, meta), sample(moved[:5], plain)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = sample(logits, SamplingMetadata.build(rows))
    assert out.token_ids.tolist() == expected.token_ids.tolist()
    assert plain_out.token_ids.shape == (5,)
    assert out.logprobs is not None and expected.logprobs is not None
    torch.testing.assert_close(out.logprobs.sampled.cpu(), expected.logprobs.sampled, atol=1e-5, rtol=1e-5)


CHECKS = {
    "rotate and store": check_rotate_and_store,
    "silu and mul": check_silu_and_mul,
    "embed": check_embed,
    "uniform bits": check_uniform_bits,
    "gumbel": check_gumbel,
    "thresholds": check_thresholds,
    "draw": check_draw,
    "draw ties": check_draw_ties,
    "draw filtered": check_draw_filtered,
    "kept set": check_kept_set,
    "nothing to draw": check_nothing_to_draw,
    "hostile numbers": check_hostile_numbers,
    "row alone": check_row_alone,
}
if not INTERPRETED:
    CHECKS["no synchronisation"] = check_no_synchronisation

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
