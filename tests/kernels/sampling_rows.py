"""Logits, records and histories that the checks of sampling kernels draw from."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from pdray.kernels.sampling.draw import draw, gumbel
from pdray.kernels.sampling.draw_triton import triton_draw_tokens
from pdray.kernels.sampling.history import Join, no_history, pack_joins, remember
from pdray.kernels.sampling.late_draw_triton import triton_draw_late
from pdray.kernels.sampling.late_scratch import MOST_GROUPS
from pdray.kernels.sampling.mask import num_mask_words
from pdray.kernels.sampling.metadata import RandomRows
from pdray.kernels.sampling.philox import philox_uniform
from pdray.kernels.sampling.rows import RECORD, WORDS, DrawTable, RowFlag, make_record
from pdray.sampling_params import SamplingParams

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter rounds float32 to bfloat16 towards zero.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
SEEDS = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, 0x1234567890ABCDEF, -1, -(2**63)])
POSITIONS = torch.tensor([0, 5, 2**31, 2**32 - 1, 2**32 + 9, 2**45, 7, 2**40])
NAN, INF = float("nan"), float("inf")
# Groups that are looked into before a row is searched; the interpreter's time grows with them.
FEW_GROUPS, SEARCH_ALL = 16 if INTERPRETED else MOST_GROUPS, 2


def make_table(
    vocab_size: int,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    min_p: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> DrawTable:
    """Rows without history; with any filter, all rows that are not greedy go through it."""
    records = np.zeros(len(seeds), RECORD)
    records["temperature"], records["seed"], records["position"] = temperature, seeds, positions
    records["top_p"] = 1.0
    for name, limit in (("min_p", min_p), ("top_k", top_k), ("top_p", top_p)):
        if limit is not None:
            records[name] = limit.clamp(-(2**31), 2**31 - 1) if name == "top_k" else limit
    has_filter = not (min_p is top_k is top_p is None)
    records["flags"] = RowFlag.LATE * ((temperature > 0).numpy() & has_filter)
    words, no_masks = (
        torch.from_numpy(records.view(np.int32).reshape(-1, WORDS)),
        torch.zeros(1, num_mask_words(vocab_size), dtype=torch.int32),
    )
    return DrawTable(words, no_history(1, vocab_size), no_masks)


def make_mask(allowed: np.ndarray) -> np.ndarray:
    """Words of a mask from [V] truths."""
    bits = np.zeros(num_mask_words(len(allowed)) * 32, dtype=np.bool_)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.int32)


def moved(table: DrawTable) -> DrawTable:
    """A copy on the device that is checked."""
    return DrawTable(*(x.clone().to(DEVICE) for x in table))


def draw_all(logits: Tensor, table: DrawTable, most_groups: int = FEW_GROUPS) -> Tensor:
    """By the kernels."""
    out = torch.full((len(logits),), -7, device=DEVICE)
    there, on_device = logits.to(DEVICE), moved(table)
    triton_draw_tokens(there, on_device, out)
    triton_draw_late(there, on_device, out, most_groups=most_groups)
    return out.cpu()


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


def make_everything(num: int, vocab_size: int) -> DrawTable:
    """Rows with every combination of biases, penalties, bans, masks, filters and reports; each has its own history."""
    rng = np.random.default_rng(3)
    records, joins, masks = [], [], []
    for i in range(num):
        params = SamplingParams(
            temperature=(0.0, 0.8, 1.3)[i % 3],
            top_k=(0, 20)[i % 4 == 1],
            top_p=(1.0, 0.9)[i % 5 < 2],
            min_p=0.02 * (i % 7 == 0),
            presence_penalty=0.5 * (i % 2),
            frequency_penalty=(0.0, 0.3, -0.2)[i % 3],
            repetition_penalty=(1.0, 1.3, 0.8)[i % 3 - 1],
            logprobs=(None, 3, 0, 20)[i % 4],
            logit_bias=make_bias(rng, vocab_size) if i % 4 == 2 else None,
        )
        record = make_record(params, i, slot=num - 1 - i, min_tokens=(0, 9)[i % 3 == 0], has_mask=i % 5 == 0)
        record["position"], record["mask"] = 4 + 2 * (i % 4), i
        records.append(record)
        masks.append(make_mask(rng.random(vocab_size) < 0.7))
        prompt, outputs, ends = (rng.integers(vocab_size, size=n) for n in (700 * (i % 3), 30 * (i % 2), 25))
        joins.append(Join(num - 1 - i, prompt, outputs, ends, params.logit_bias))
    history = no_history(num, vocab_size)
    remember(history, pack_joins(joins))
    words = torch.from_numpy(np.concatenate(records).view(np.int32).reshape(-1, WORDS))
    return DrawTable(words, history, torch.from_numpy(np.stack(masks)))


def make_bias(rng: np.random.Generator, vocab_size: int) -> dict[int, float]:
    """Numbers for a third of the first ids, some of them shared, and a ban and a wish as clients write them."""
    ids = rng.permutation(min(vocab_size, 900))[: vocab_size // 3 + 1].tolist()
    bias = dict(zip(ids, np.round(rng.normal(size=len(ids)) * 3, 1).tolist(), strict=True))
    return {**bias, ids[0]: -100.0, vocab_size - 1: 2.5}
