"""Checks of the sampling kernels; see attention_cases.py."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import torch
from sampling_rows import (
    DEVICE,
    DTYPES,
    FEW_GROUPS,
    INF,
    INTERPRETED,
    NAN,
    SEARCH_ALL,
    assert_drawn,
    draw_all,
    make_everything,
    make_logits,
    make_table,
    moved,
    random_rows,
)
from torch import Tensor

from pdray.kernels.sampling.draw_rows import draw_late, draw_tokens, report
from pdray.kernels.sampling.draw_triton import triton_draw_tokens
from pdray.kernels.sampling.history import BIASES, Join, pack_joins, remember
from pdray.kernels.sampling.history_triton import triton_remember
from pdray.kernels.sampling.late_draw_triton import triton_draw_late
from pdray.kernels.sampling.late_scratch import LateScratch
from pdray.kernels.sampling.report_triton import triton_report
from pdray.kernels.sampling.rows import DrawTable, RowFlag


def check_draw() -> None:
    for dtype, vocab_size in itertools.product(DTYPES, (1, 37, 1030, 4999)):
        if INTERPRETED and dtype == torch.float16 and vocab_size != 1030:
            continue
        for num_rows, span in ((1, None), (13, None), (13, 2048)):
            logits = make_logits(num_rows, vocab_size, dtype)
            random, temperature = random_rows(num_rows)
            out = torch.full((num_rows,), -7, device=DEVICE)
            table = moved(make_table(vocab_size, temperature, random.seeds, random.positions))
            triton_draw_tokens(logits.to(DEVICE), table, out, span)
            assert_drawn(out, logits, random, temperature, f"{dtype}, {num_rows} rows of {vocab_size}, span {span}")


def check_draw_ties() -> None:
    """The lowest id, whether the equals are in one tile, in one lane of two tiles, or in two programs."""
    logits = torch.zeros(3, 5000)
    for row, equals in enumerate(([4999, 3, 7], [1025, 1537], [4100, 1500])):
        logits[row, equals] = 2.0
    zeros = torch.zeros(3, dtype=torch.int64)
    table = moved(make_table(5000, zeros.float(), zeros, zeros))
    for span in (1024, 2048, 8192):
        out = torch.empty_like(zeros, device=DEVICE)
        triton_draw_tokens(logits.to(DEVICE), table, out, span)
        assert out.tolist() == [3, 1025, 1500]


def ways(dtype: torch.dtype, used: int) -> list[int]:
    """Numbers of groups that are looked into; in the interpreter not all of them for every dtype and set of filters."""
    if not INTERPRETED:
        return [FEW_GROUPS, SEARCH_ALL]
    if dtype == torch.float32:
        return [FEW_GROUPS]
    return [FEW_GROUPS, SEARCH_ALL] if used in (2, 4, 7) else []


def check_draw_late() -> None:
    """Each filter, their combinations, rows with and without them in one batch; every draw is the reference's.

    Whether few groups of tokens decide a row, or all of them are searched.
    """
    num = 13 if INTERPRETED else 63
    min_p = torch.tensor([0.0, 0.05, 0.3, 1.0]).repeat(num)[:num]
    top_k = torch.tensor([0, 1, 5, 50, -1, 900, 10**6]).repeat(num)[:num]
    top_p = torch.tensor([1.0, 0.9, 0.5, 1e-6, 0.999, 0.3, 0.95, 0.7, 0.1]).repeat(num)[:num]
    shapes = [(37, num), (4500, 4)] if INTERPRETED else [(9000, num)]  # each takes a second to compile
    for dtype, used, (vocab_size, rows) in itertools.product(DTYPES, range(1, 8), shapes):
        filters = [f.roll(used)[:rows] if used >> i & 1 else None for i, f in enumerate((min_p, top_k, top_p))]
        logits = make_logits(rows, vocab_size, dtype)
        random, temperature = random_rows(rows, *filters)
        table = make_table(vocab_size, temperature, random.seeds, random.positions, *filters)
        for most_groups in ways(dtype, used)[: None if vocab_size > 37 else 1]:
            out = draw_all(logits, table, most_groups)
            case = f"{dtype}, filters {used:03b}, {rows} rows of {vocab_size}, {most_groups} groups"
            assert_drawn(out, logits, random, temperature, case)


def check_kept_set() -> None:
    """The set that stays, seen through many draws of one row: all of it and nothing else, and among equals the lowest.

    Five equal tokens of 0.16 each behind one of 0.2; a mass that needs two of them leaves the two lowest ids.
    """
    num_draws, equals = 22 if INTERPRETED else 60, [20, 1030, 1500, 2060, 2080]
    logits = torch.full((2100,), float("-inf"))
    logits[equals], logits[2090] = float(torch.tensor(0.16).log()), float(torch.tensor(0.2).log())
    rows = logits.to(DTYPES[-1]).expand(num_draws, -1)
    positions, ones = torch.arange(num_draws), torch.ones(num_draws)
    for filters, expected in (
        ((None, None, 0.5), {2090, *equals[:2]}),
        ((None, None, 0.8), {2090, *equals[:4]}),
        ((None, 3, None), {2090, *equals}),
        ((None, 1, None), {2090}),
        ((0.3, None, None), {2090, *equals}),
        ((0.9, None, None), {2090}),
        ((None, 3, 0.25), {2090, equals[0]}),
    ):
        types = (torch.float32, torch.int64, torch.float32)
        limits = [
            None if f is None else torch.full((num_draws,), f, dtype=t) for f, t in zip(filters, types, strict=True)
        ]
        table = make_table(2100, ones, torch.full_like(positions, 9), positions, *limits)
        out = draw_all(rows, table)
        assert set(out.tolist()) == expected, f"{filters}: {sorted(set(out.tolist()))}"
        num = 3 if INTERPRETED else num_draws
        searched = draw_all(rows[:num], table._replace(records=table.records[:num]), SEARCH_ALL)
        assert searched.tolist() == out[:num].tolist(), f"{filters}, searched"


def check_nothing_to_draw() -> None:
    """A row whose ids are all banned, or all not a number, still gives an id."""
    logits = torch.stack((torch.full((5000,), float("-inf")), torch.full((5000,), float("nan"))))
    ones, seeds = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    for filters in ((None, None, None), (0.1 * ones, seeds + 3, 0.9 * ones)):
        assert draw_all(logits, make_table(5000, ones, seeds, seeds, *filters)).tolist() == [0, 0]


def check_hostile_numbers() -> None:
    """NaN, infinities, and parameters that nobody has checked: every row draws what the reference draws.

    Half of the rows are good ones, which must not notice.
    """
    num, vocab_size = 24, 520 if INTERPRETED else 5000
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
            table, expected = (
                make_table(vocab_size, temperature, random.seeds, random.positions, *filters),
                torch.full((num,), -7),
            )
            draw_tokens(logits, table, expected)
            draw_late(logits, table, expected)
            for most_groups in ways(dtype, used):
                out = draw_all(logits, table, most_groups).tolist()
                assert out == expected.tolist(), f"{dtype}, filters {used:03b}: {out} {expected.tolist()}"


def check_row_alone() -> None:
    """A row draws the same alone as in a batch."""
    logits = make_logits(12, 3000, torch.float32)
    random, temperature = random_rows(12, None, torch.full((12,), 40), torch.full((12,), 0.9))
    table = make_table(3000, temperature, *random[2:])
    together = draw_all(logits, table).tolist()
    assert together == [
        int(draw_all(logits[i : i + 1], table._replace(records=table.records[i : i + 1]))) for i in range(12)
    ]


def check_remember() -> None:
    """Slots hold what the reference writes, whatever they held; others stay as they were."""
    rng = np.random.default_rng(0)
    joins = [
        Join(slot, *(rng.integers(997, size=n) for n in sizes), bias)
        for slot, sizes, bias in (
            (4, (0, 0, 0), None),
            (1, (3000, 1, 2), {5: 0.25, 996: -100.0, 0: 0.25}),
            (3, (1, 2500, 0), {i: i / 8 for i in range(900)}),
        )
    ]
    before = torch.full((5, BIASES + 997), 123, dtype=torch.int32)
    expected, out = before.clone(), before.clone().to(DEVICE)
    packed = pack_joins(joins)
    remember(expected, packed)
    triton_remember(out, packed._replace(words=packed.words.to(DEVICE)))
    assert torch.equal(out.cpu(), expected)
    assert bool(expected[3, BIASES:].any()) and not bool(expected[4].any()) and bool((expected[[0, 2]] == 123).all())


def check_changed_logits() -> None:
    """Biases, penalties, ends, masks and filters together, drawn and counted as by the reference."""
    num, vocab_size = 24, 1030 if INTERPRETED else 5000
    for dtype in DTYPES:
        logits, table = make_logits(num, vocab_size, dtype), make_everything(num, vocab_size)
        for most_groups in (FEW_GROUPS, SEARCH_ALL):
            expected_table, on_device = DrawTable(*(x.clone() for x in table)), moved(table)
            expected, out = torch.full((num,), -7), torch.full((num,), -7, device=DEVICE)
            draw_tokens(logits, expected_table, expected)
            draw_late(logits, expected_table, expected)
            triton_draw_tokens(logits.to(DEVICE), on_device, out)
            triton_draw_late(logits.to(DEVICE), on_device, out, most_groups=most_groups)
            assert out.tolist() == expected.tolist(), f"{dtype}: {out.tolist()} for {expected.tolist()}"
            assert torch.equal(on_device.history.cpu(), expected_table.history), f"{dtype}: histories"
        assert int((expected_table.history != table.history).sum()) > num // 2


def check_masks_alone() -> None:
    """Late rows without filters are drawn as with the kernels for filters, and others are left as they are.

    Also where only some logits or none are left by a mask, with penalties, and launched twice with the same scratch.
    """
    num, vocab_size = 24, 1030 if INTERPRETED else 5000
    for dtype in DTYPES:
        logits, table = make_logits(num, vocab_size, dtype), make_everything(num, vocab_size)
        records, masks = table.view(), table.masks.numpy()
        records["min_p"], records["top_k"], records["top_p"] = 0.0, 0, 1.0
        is_masked = (records["flags"] & RowFlag.MASKED) != 0
        records["flags"] = (records["flags"] & ~RowFlag.LATE) | RowFlag.LATE * is_masked
        masks[5], masks[10, 1:] = 0, 0
        scratch = LateScratch.of(num, vocab_size, torch.device(DEVICE))
        expected_table, expected = DrawTable(*(x.clone() for x in table)), torch.full((num,), -7)
        draw_late(logits, expected_table, expected)
        assert (expected.numpy() == -7).tolist() == (~is_masked).tolist() and expected[5] == 0 and expected[10] < 32
        for way in ({"may_filter": False}, {"may_filter": False}, {"may_need_search": False}, {}):
            on_device, out = moved(table), torch.full((num,), -7, device=DEVICE)
            triton_draw_late(logits.to(DEVICE), on_device, out, scratch=scratch, **way)
            assert out.tolist() == expected.tolist(), f"{dtype}, {way}: {out.tolist()} for {expected.tolist()}"
            assert torch.equal(on_device.history.cpu(), expected_table.history), f"{dtype}, {way}: histories"


def check_report() -> None:
    """Tokens, ranks and the order of equals to the last bit, log-probabilities to rounding."""
    num, num_top = 24, 20
    for dtype, vocab_size in itertools.product(DTYPES, (7, 1030 if INTERPRETED else 5000)):
        logits, table = make_logits(num, vocab_size, dtype), make_everything(num, vocab_size)
        logits[3], logits[5], logits[7, ::2], logits[9, 3] = NAN, -INF, NAN, INF
        token_ids = torch.arange(num) % vocab_size
        expected = report(logits, table, token_ids, num_top)
        out = triton_report(logits.to(DEVICE), moved(table), token_ids.to(DEVICE), num_top).cpu()
        records = table.view()
        for i in range(num):
            case = f"{dtype}, row {i} of {vocab_size}"
            assert out[i, 0] == expected[i, 0], case
            if not records["flags"][i] & RowFlag.REPORTED:
                continue
            lists = slice(3, 3 + num_top)
            known = min(int(records["num_logprobs"][i]), vocab_size)
            assert out[i, 1] == expected[i, 1] and torch.equal(out[i, lists], expected[i, lists]), case
            floats = [2, *range(3 + num_top, 3 + num_top + known)]
            found, wanted = (x[i, floats].contiguous().view(torch.float32) for x in (out, expected))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text: f"{case}: {text}")  # noqa: B023


def check_no_synchronisation() -> None:
    """Everything at once makes the host wait for nothing, in the model's dtype. On CUDA."""
    num, vocab_size = 24, 5000
    logits, table = torch.randn(num, vocab_size).bfloat16(), make_everything(num, vocab_size)
    expected = torch.full((num,), -7)
    there, on_device, out = logits.to(DEVICE), moved(table), expected.to(DEVICE)
    history = on_device.history.clone()
    packed = pack_joins([Join(0, [1, 2, 3], [4], [5], {6: 1.0})], pin_memory=True)

    def everything() -> Tensor:
        on_device.history.copy_(history)
        draw_tokens(there, on_device, out)
        draw_late(there, on_device, out)
        remember(on_device.history[:1].clone(), packed)
        return report(there, on_device, out, 20)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_report = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    draw_tokens(logits, table, expected)
    draw_late(logits, table, expected)
    assert out.tolist() == expected.tolist() == packed_report[:, 0].tolist()


CHECKS = {
    "draw": check_draw,
    "draw ties": check_draw_ties,
    "draw late": check_draw_late,
    "kept set": check_kept_set,
    "nothing to draw": check_nothing_to_draw,
    "hostile numbers": check_hostile_numbers,
    "row alone": check_row_alone,
    "remember": check_remember,
    "changed logits": check_changed_logits,
    "masks alone": check_masks_alone,
    "report": check_report,
}
if not INTERPRETED:
    CHECKS["no synchronisation"] = check_no_synchronisation

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
