"""Sampling survives every number: NaN, infinities and parameters out of range cost a row nothing but its choice."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pdray.kernels.sampling.draw import clean_logits
from pdray.kernels.sampling.sample import SamplingMetadata, SamplingRow, keep_top_k, keep_top_p, sample

NAN, INF = float("nan"), float("inf")
VOCAB_SIZE = 1000


@dataclass(frozen=True)
class Params:
    """SamplingParams that nobody has checked."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = 3
    logit_bias: dict[int, float] | None = None


WAYS = {
    "plain": Params(),
    "greedy": Params(temperature=0.0),
    "top_k": Params(top_k=5),
    "top_p": Params(top_p=0.9),
    "min_p": Params(min_p=0.1),
    "penalties": Params(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
    "all": Params(0.8, 0.9, 40, 0.05, 0.5, 0.5, 1.2),
}
HOSTILE = {
    "top_p rounds to 0": Params(top_p=1e-50),
    "top_p 0": Params(top_p=0.0),
    "top_p below 0": Params(top_p=-1.0),
    "top_p subnormal": Params(top_p=1e-40),
    "min_p above 1": Params(min_p=7.0),
    "min_p infinite": Params(min_p=INF),
    "temperature tiny": Params(temperature=1e-5),
    "temperature huge": Params(temperature=1e38),
    "temperature infinite": Params(temperature=INF),
    "repetition without a reciprocal": Params(repetition_penalty=1e-39, top_p=0.5),
    "repetition rounds to 0": Params(repetition_penalty=1e-50, top_k=4),
    "repetition infinite": Params(repetition_penalty=INF, min_p=0.2),
    "repetition NaN": Params(repetition_penalty=NAN, top_p=0.5),
    "presence NaN": Params(presence_penalty=NAN),
    "frequency infinite": Params(frequency_penalty=-INF, top_p=0.5),
    "top_k of 63 bits": Params(top_k=2**63 - 1),
}


def run(logits: Tensor, rows: list[SamplingRow]) -> Any:
    return sample(logits, SamplingMetadata.build(rows))


def row(params: Any, position: int = 0) -> SamplingRow:
    return SamplingRow(params, 11, position, (1, 2, 3), (4, 4, 5))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("filling", [NAN, -INF, INF, 3e38, -3e38])
def test_a_row_of_one_hostile_number_draws_a_token(way: str, filling: float) -> None:
    """And what stands beside it draws what it draws alone."""
    torch.manual_seed(5)
    logits = torch.randn(3, VOCAB_SIZE) * 3
    rows = [row(WAYS[way], position) for position in range(3)]
    alone = [run(logits[i : i + 1], rows[i : i + 1]).token_ids[0] for i in range(3)]
    logits[1] = filling
    out = run(logits, rows)
    assert out.token_ids[0] == alone[0] and out.token_ids[2] == alone[2]
    assert 0 <= int(out.token_ids[1]) < VOCAB_SIZE
    if filling != filling or filling < 0:
        assert int(out.token_ids[1]) == 0, "nothing to draw from"
    assert not bool(out.logprobs.sampled.isnan().any() | out.logprobs.top_logprobs.isnan().any())
    assert bool(((out.logprobs.top_token_ids >= 0) & (out.logprobs.top_token_ids < VOCAB_SIZE)).all())


@pytest.mark.parametrize("way", WAYS)
def test_hostile_numbers_among_good_ones_are_not_drawn(way: str) -> None:
    """NaN counts as -inf: the good ids are drawn as if the row had never had it."""
    torch.manual_seed(6)
    logits = torch.randn(40, VOCAB_SIZE) * 3
    rows = [row(WAYS[way], position) for position in range(40)]
    without, with_nan = logits.clone(), logits.clone()
    without[:, ::3], with_nan[:, ::3] = -INF, NAN
    expected = run(without, rows)
    out = run(with_nan, rows)
    assert torch.equal(out.token_ids, expected.token_ids) and bool((out.token_ids % 3 != 0).all())
    assert torch.equal(out.logprobs.top_logprobs, expected.logprobs.top_logprobs)


@pytest.mark.parametrize("way", WAYS)
def test_an_infinite_logit_wins(way: str) -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[0, 700], logits[1, [650, 901]] = INF, INF
    out = run(logits, [row(WAYS[way]), row(replace(WAYS[way], temperature=0.0))])
    assert out.token_ids.tolist() == [700, 650]


@pytest.mark.parametrize("case", HOSTILE)
def test_unchecked_parameters_draw_a_token(case: str) -> None:
    """A filter that would keep nothing keeps the most likely token; other rows of the batch do not notice."""
    torch.manual_seed(7)
    logits = torch.randn(3, VOCAB_SIZE) * 3
    rows = [row(WAYS["all"]), row(HOSTILE[case], 1), row(WAYS["top_p"], 2)]
    out = run(logits, rows)
    for i in (0, 2):
        assert out.token_ids[i] == run(logits[i : i + 1], rows[i : i + 1]).token_ids[0]
    assert 0 <= int(out.token_ids[1]) < VOCAB_SIZE
    if case.startswith(("top_p", "min_p")) or case == "temperature tiny":
        assert int(out.token_ids[1]) == int(logits[1].argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clean_logits_are_finite_or_minus_infinity(dtype: torch.dtype) -> None:
    logits = torch.tensor([NAN, INF, -INF, 1.5, -2.0], dtype=dtype)
    clean = clean_logits(logits)
    assert clean.dtype == dtype and clean[[0, 2, 3, 4]].tolist() == [-INF, -INF, 1.5, -2.0]
    assert bool(clean[1].isfinite()) and int(clean.argmax()) == 1


def test_filters_keep_the_most_likely_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]]).expand(6, -1)
    limits = torch.tensor([0.0, -1.0, 1e-45, NAN, -INF, 1.0])
    kept = (keep_top_p(logits, limits) > -INF).tolist()
    assert kept[:3] == [[False, True, False]] * 3 and kept[4] == kept[0]
    assert kept[3] == kept[5] == [True, True, True], "NaN is off"
    assert bool((keep_top_k(logits, torch.tensor([1, 2**62, -(2**62), 0, 3, 2]))[:, 1] > -INF).all())


@pytest.mark.parametrize(("temperature", "top_p"), [*itertools.product((0.0, 1e-3, 100.0), (1e-6, 0.5, 1.0))])
def test_penalties_that_overflow(temperature: float, top_p: float) -> None:
    """The smallest penalty that is accepted makes logits infinite: any of those may be drawn."""
    logits = torch.full((1, VOCAB_SIZE), -50.0)
    logits[0, [1, 4]] = torch.tensor([30.0, 40.0])
    params = Params(temperature=temperature, top_p=top_p, repetition_penalty=2.0**-126)
    assert int(run(logits, [row(params)]).token_ids[0]) in (1, 4)
