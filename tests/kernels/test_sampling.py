"""Sampling against an independent float64 reference: distributions, penalties, filters, logprobs, reproducibility."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
import torch
from torch import Tensor

from pdray.kernels.sampling.metadata import GREEDY_TEMPERATURE
from pdray.kernels.sampling.sample import SamplingMetadata, SamplingRow, draw, keep_top_k, keep_top_p, sample
from pdray.sampling_params import SamplingParams

NUM_DRAWS = 20_000


def sample_row(logits: Tensor, row: SamplingRow) -> int:
    return int(sample(logits[None], SamplingMetadata.build([row])).token_ids[0])


def exact_distribution(logits: list[float], row: SamplingRow) -> list[float]:
    """Probabilities by the parameters' definitions, with plain Python numbers."""
    params = row.params
    logits = list(logits)
    seen = set(row.prompt_token_ids) | set(row.output_token_ids)
    counts = Counter(row.output_token_ids)
    for token_id, logit in enumerate(logits):
        if token_id in seen:
            penalized = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
            logits[token_id] = penalized
        logits[token_id] -= params.frequency_penalty * counts[token_id]
        logits[token_id] -= params.presence_penalty * (counts[token_id] > 0)
    for token_id in row.banned_token_ids:
        logits[token_id] = -math.inf
    weights = [math.exp(logit / params.temperature) for logit in logits]
    largest = max(weights)
    weights = [w if w >= params.min_p * largest else 0.0 for w in weights]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if params.top_k > 0:
        for token_id in order[params.top_k :]:
            weights[token_id] = 0.0
    total = sum(weights)
    mass = 0.0
    for token_id in order:
        if mass >= params.top_p:
            weights[token_id] = 0.0
        mass += weights[token_id] / total
    total = sum(weights)
    return [w / total for w in weights]


CASES = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.4),
    "hot": SamplingParams(temperature=2.5),
    "top_k": SamplingParams(top_k=4),
    "top_k_1": SamplingParams(top_k=1),
    "top_k_of_everything": SamplingParams(top_k=1000),
    "top_p": SamplingParams(top_p=0.7),
    "top_p_tiny": SamplingParams(top_p=1e-6),
    "min_p": SamplingParams(min_p=0.15),
    "min_p_1": SamplingParams(min_p=1.0),
    "repetition": SamplingParams(repetition_penalty=1.8),
    "repetition_below_1": SamplingParams(repetition_penalty=0.6),
    "presence": SamplingParams(presence_penalty=1.1),
    "frequency": SamplingParams(frequency_penalty=0.7),
    "negative_penalties": SamplingParams(presence_penalty=-0.5, frequency_penalty=-0.4),
    "temperature_top_k_top_p": SamplingParams(temperature=1.7, top_k=9, top_p=0.8),
    "min_p_top_p": SamplingParams(temperature=1.3, min_p=0.1, top_p=0.85),
    "everything": SamplingParams(
        temperature=1.4,
        top_k=10,
        top_p=0.93,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("banned", [(), (0, 7)])
def test_distribution(name: str, banned: tuple[int, ...]) -> None:
    """Draws over many positions follow the exact distribution (chi-square, five sigma); ruled-out ids never come."""
    torch.manual_seed(3)
    logits = torch.randn(17) * 1.5
    row = SamplingRow(CASES[name], 0, 0, [1, 2, 3, 3], [3, 5, 5, 5, 9], banned)
    expected = torch.tensor(exact_distribution(logits.tolist(), row), dtype=torch.float64)
    one = SamplingMetadata.build([row])
    many = SamplingMetadata.build([row._replace(seed=11, position=i) for i in range(NUM_DRAWS)])
    assert one.random is not None
    assert one.random.rows.tolist() == [0]
    token_ids = sample(logits.expand(NUM_DRAWS, -1), many).token_ids
    observed = torch.bincount(token_ids, minlength=17).to(torch.float64)
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    wanted = expected[kept] * NUM_DRAWS
    chi_square = float(((observed[kept] - wanted) ** 2 / wanted).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5


def test_the_reference_can_tell_distributions_apart() -> None:
    """The same statistic rejects the draws of one temperature against those of a slightly different one."""
    torch.manual_seed(3)
    logits = torch.randn(17) * 1.5
    rows = [SamplingRow(SamplingParams(temperature=1.1), 11, i) for i in range(NUM_DRAWS)]
    observed = torch.bincount(
        sample(logits.expand(NUM_DRAWS, -1), SamplingMetadata.build(rows)).token_ids, minlength=17
    )
    wanted = torch.tensor(exact_distribution(logits.tolist(), SamplingRow(SamplingParams(), 0, 0))) * NUM_DRAWS
    assert float(((observed - wanted) ** 2 / wanted).sum()) > 16 + 5 * 32**0.5


def test_different_seeds_are_independent_samples() -> None:
    logits = torch.zeros(8)
    rows = [SamplingRow(SamplingParams(), seed, 0) for seed in range(NUM_DRAWS)]
    observed = torch.bincount(sample(logits.expand(NUM_DRAWS, -1), SamplingMetadata.build(rows)).token_ids, minlength=8)
    wanted = NUM_DRAWS / 8
    assert float(((observed - wanted) ** 2 / wanted).sum()) <= 7 + 5 * 14**0.5


@pytest.mark.parametrize("name", ["repetition", "repetition_below_1", "presence", "frequency", "everything"])
def test_penalties_are_exact_when_greedy(name: str) -> None:
    """The argmax of the penalized logits, over random contexts, one of them empty."""
    rng = random.Random(1)
    torch.manual_seed(1)
    logits = torch.randn(60, 40)
    params = CASES[name]
    greedy = SamplingParams(
        temperature=0,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )
    rows = [
        SamplingRow(greedy, 0, 0, rng.choices(range(40), k=i % 7), rng.choices(range(40), k=i % 30)) for i in range(60)
    ]
    before = logits.clone()
    token_ids = sample(logits, SamplingMetadata.build(rows)).token_ids.tolist()
    assert torch.equal(logits, before)
    for i, row in enumerate(rows):
        probabilities = exact_distribution(logits[i].tolist(), row._replace(params=_warm(greedy)))
        assert token_ids[i] == max(range(40), key=lambda t: probabilities[t])  # noqa: B023


def _warm(params: SamplingParams) -> SamplingParams:
    return msgspec.structs.replace(params, temperature=1.0)


def test_banned_ids_bind_greedy_rows_of_their_own_only() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])
    rows = [SamplingRow(SamplingParams(temperature=0), 0, 0, banned_token_ids=(1,))]
    rows.append(SamplingRow(SamplingParams(temperature=0), 0, 0))
    assert sample(logits, SamplingMetadata.build(rows)).token_ids.tolist() == [2, 1]


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, 5000)
    logits[:, [4000, 70, 900]] = 2.0
    greedy = SamplingRow(SamplingParams(temperature=0, logprobs=3), 0, 0)
    tiny_top_p = SamplingRow(SamplingParams(top_p=1e-9), 5, 0)
    out = sample(logits, SamplingMetadata.build([greedy, tiny_top_p]))
    assert out.token_ids.tolist() == [70, 70]
    assert out.logprobs is not None
    assert out.logprobs.top_token_ids.tolist() == [[70, 900, 4000]]


def test_top_p_keeps_the_smallest_set_among_equals() -> None:
    """Ten equal tokens and top_p 0.35: four of them, by id; and the set includes the one that crosses."""
    kept = keep_top_p(torch.zeros(2, 10), torch.tensor([0.35, 1.0]))
    assert (kept[0] > float("-inf")).tolist() == [True] * 4 + [False] * 6
    assert bool((kept[1] == 0).all())
    kept = keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([0.6]))
    assert (kept > float("-inf")).tolist() == [[True, True, False]]


def test_top_p_beyond_the_first_candidates() -> None:
    """A flat row needs far more candidates than the first look takes; a peaked one beside it does not."""
    torch.manual_seed(0)
    logits = torch.stack([torch.randn(9000) * 0.1, torch.randn(9000) * 8])
    kept = keep_top_p(logits, torch.tensor([0.9, 0.9])) > float("-inf")
    for row in range(2):
        probabilities = logits[row].to(torch.float64).softmax(0)
        order = probabilities.argsort(descending=True, stable=True)
        mass_before = probabilities[order].cumsum(0) - probabilities[order]
        expected = int((mass_before < 0.9).sum())
        assert abs(int(kept[row].sum()) - expected) <= 1  # float32 probabilities may move the crossing by one
        assert bool(kept[row][order[: expected - 1]].all())


def test_top_k_keeps_ties_of_the_kth() -> None:
    kept = keep_top_k(torch.tensor([[3.0, 1.0, 2.0, 2.0], [3.0, 1.0, 2.0, 2.0]]), torch.tensor([2, -1]))
    assert (kept > float("-inf")).tolist() == [[True, False, True, True], [True] * 4]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    torch.manual_seed(4)
    logits = torch.randn(4, 300)
    rows = [
        SamplingRow(SamplingParams(temperature=0.5, top_k=3, logprobs=5, repetition_penalty=3.0), 1, 0, range(300)),
        SamplingRow(SamplingParams(temperature=0), 0, 0),
        SamplingRow(SamplingParams(logprobs=0, temperature=5.0), 2, 7),
        SamplingRow(SamplingParams(logprobs=2, temperature=0), 2, 7, banned_token_ids=(int(logits[3].argmax()),)),
    ]
    out = sample(logits, SamplingMetadata.build(rows))
    assert out.logprobs is not None
    assert out.logprobs.rows.tolist() == [0, 2, 3]
    assert out.logprobs.top_token_ids.shape == (3, 5)
    for i, row in enumerate([0, 2, 3]):
        expected = logits[row].to(torch.float64).log_softmax(0)
        token_id = int(out.token_ids[row])
        assert float(out.logprobs.sampled[i]) == pytest.approx(float(expected[token_id]), abs=1e-5)
        assert int(out.logprobs.sampled_rank[i]) == 1 + int((logits[row] > logits[row, token_id]).sum())
        order = expected.argsort(descending=True, stable=True)[:5]
        assert out.logprobs.top_token_ids[i].tolist() == order.tolist()
        torch.testing.assert_close(out.logprobs.top_logprobs[i].to(torch.float64), expected[order], atol=1e-5, rtol=0)
    assert int(out.logprobs.sampled_rank[2]) == 2


def test_rank_of_equals_is_the_best_one() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0]])
    out = sample(logits, SamplingMetadata.build([SamplingRow(SamplingParams(logprobs=1), 3, 2)]))
    assert out.logprobs is not None
    assert out.logprobs.sampled_rank.tolist() == [1]


def test_logprobs_order_signs_and_zeros() -> None:
    logits = torch.tensor([[-1.0, 0.0, -0.0, 2.0, -3.0, float("-inf"), 0.5]])
    out = sample(logits, SamplingMetadata.build([SamplingRow(SamplingParams(temperature=0, logprobs=7), 0, 0)]))
    assert out.logprobs is not None
    assert out.logprobs.top_token_ids.tolist() == [[3, 6, 1, 2, 0, 4, 5]]


def test_no_logprobs_unless_asked() -> None:
    meta = SamplingMetadata.build([SamplingRow(SamplingParams(temperature=0), 0, 0)])
    assert meta == SamplingMetadata()
    assert sample(torch.randn(1, 9), meta).logprobs is None


def test_temperature_below_the_limit_is_greedy() -> None:
    row = SamplingRow(SamplingParams(temperature=GREEDY_TEMPERATURE / 2), 0, 0)
    assert SamplingMetadata.build([row]).random is None


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_a_row_does_not_depend_on_the_batch(num_threads: int) -> None:
    """Tokens, logprobs and, for the draw, the filtered scores' winner are bitwise those of the row alone."""
    rng = random.Random(2)
    torch.manual_seed(2)
    vocab_size = 3001
    names = [*CASES, "greedy"]
    rows, logits = [], torch.randn(57, vocab_size) * torch.rand(57, 1) * 4
    for i in range(57):
        params = _with_logprobs(CASES.get(names[i % len(names)], SamplingParams(temperature=0)), rng)
        context = rng.choices(range(vocab_size), k=rng.randint(0, 50))
        banned = rng.choices(range(vocab_size), k=rng.randint(0, 3))
        rows.append(SamplingRow(params, rng.getrandbits(63), rng.randint(0, 5000), context, context[::2], banned))
    together = sample(logits, SamplingMetadata.build(rows))
    assert together.logprobs is not None
    reported = together.logprobs.rows.tolist()
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], SamplingMetadata.build([row]))
        assert alone.token_ids[0] == together.token_ids[i], f"row {i}: {row.params}"
        if row.params.logprobs is None:
            assert alone.logprobs is None
            continue
        assert alone.logprobs is not None
        j, k = reported.index(i), row.params.logprobs
        assert torch.equal(alone.logprobs.sampled[0], together.logprobs.sampled[j])
        assert torch.equal(alone.logprobs.sampled_rank[0], together.logprobs.sampled_rank[j])
        assert torch.equal(alone.logprobs.top_token_ids[0], together.logprobs.top_token_ids[j, :k])
        assert torch.equal(alone.logprobs.top_logprobs[0], together.logprobs.top_logprobs[j, :k])


def _with_logprobs(params: SamplingParams, rng: random.Random) -> SamplingParams:
    return msgspec.structs.replace(params, logprobs=rng.choice([None, 0, 3, 20]))


def test_filters_do_not_change_the_noise() -> None:
    """A filter that keeps everything draws the same tokens through the other code path."""
    torch.manual_seed(8)
    logits = torch.randn(200, 50)
    plain = [SamplingRow(SamplingParams(), 4, i) for i in range(200)]
    filtered = [SamplingRow(SamplingParams(min_p=1e-30), 4, i) for i in range(200)]
    a, b = SamplingMetadata.build(plain).random, SamplingMetadata.build(filtered).random
    assert a is not None
    assert b is not None
    assert a.min_p is None
    assert b.min_p is not None
    assert torch.equal(draw(logits, a), draw(logits, b))


def test_reproducible_by_seed_and_position() -> None:
    torch.manual_seed(9)
    logits = torch.randn(1000)
    row = SamplingRow(SamplingParams(), 2**62 + 17, 123)
    first = sample_row(logits, row)
    assert all(sample_row(logits, row) == first for _ in range(3))
    others = {sample_row(logits, row._replace(position=i)) for i in range(50)}
    assert len(others) > 20
    others = {sample_row(logits, row._replace(seed=i)) for i in range(50)}
    assert len(others) > 20
