"""The controller under Poisson load in simulated time, with the costs of an 8B model on an H100."""

from __future__ import annotations

import pytest

from pdray.engine.mux.costs import Arrangement
from pdray.engine.mux.pace import Targets
from pdray.testing.simulated_mux import FITTED, FITTED_8K, SPLITS_8K, TTFT_MS, in_time, serve


@pytest.mark.parametrize(
    ("input_len", "tpot_ms", "rate", "chunks"),
    [(2048, 15, 7.5, (128, 256, 512)), (2048, 8, 3.5, (128, 256, 512)), (8192, 15, 1.1, (128, 384, 1024))],
)
def test_as_many_requests_are_in_time_as_in_the_best_mixed_steps(
    input_len: int, tpot_ms: float, rate: float, chunks: tuple[int, ...]
) -> None:
    def share(how: Targets | Arrangement) -> float:
        runs = [serve(how, rate, input_len=input_len, num_requests=150, seed=seed) for seed in range(2)]
        return sum(in_time(run, tpot_ms) for run in runs) / len(runs)

    mine = share(Targets(tpot_ms / 1000, TTFT_MS / 1000))
    best = max(share(Arrangement(chunk=chunk)) for chunk in chunks)
    assert best > 0.8 and mine >= best - 0.02, "one request in 50"


def test_beyond_the_knee_it_does_not_miss_both_targets() -> None:
    """Where not all can be served in time, steps within the TPOT serve most; late prompts do not hurry, and go last."""
    ways: list[Targets | Arrangement] = [Targets(0.015, TTFT_MS / 1000), *(Arrangement(chunk=n) for n in (256, 384))]
    mine, *mixed = (in_time(serve(way, 10), 15) for way in ways)
    assert 0.2 < max(mixed) < 0.9 and mine >= 1.3 * max(mixed)


def test_prompts_do_not_wait_for_streams_that_are_lost() -> None:
    """Where half of all streams cannot have their TPOT, steps that are small for their sake make first tokens late."""
    ways: list[Targets | Arrangement] = [Targets(0.008, TTFT_MS / 1000), *(Arrangement(chunk=n) for n in (128, 256))]
    runs = [[serve(way, 1.0, input_len=8192, costs=FITTED, splits={}, seed=seed) for seed in range(2)] for way in ways]
    mine, *mixed = (sum(in_time(run, 8) for run in each) for each in runs)
    assert mine >= max(mixed)


def test_a_split_is_chosen_where_it_delays_streams_less_for_each_token() -> None:
    """As long prompts do on an H100: in small steps each token reads its context again."""
    ways: list[Targets | Arrangement] = [Targets(0.015, TTFT_MS / 1000), *(Arrangement(chunk=n) for n in (256, 512))]
    runs = [serve(way, 1.6, input_len=8192, costs=FITTED_8K, splits=SPLITS_8K) for way in ways]
    mine, *mixed = (in_time(run, 15) for run in runs)
    assert mine >= 1.1 * max(mixed) and max(mixed) > 0.4


def test_it_need_not_be_told_how_long_answers_are() -> None:
    """max_tokens far beyond them is no reason to expect so many, by which no stream would seem lost."""
    targets = Targets(0.015, TTFT_MS / 1000)
    told, untold = (in_time(serve(targets, 10, max_tokens=number), 15) for number in (256, 4096))
    assert untold >= told - 0.06 and untold > 1.3 * in_time(serve(Arrangement(chunk=256), 10), 15)


def test_without_partitions_and_with_them_the_same_requests_are_served() -> None:
    targets = Targets(0.015, TTFT_MS / 1000)
    assert len(serve(targets, 4, num_requests=40, splits={})) == len(serve(targets, 4, num_requests=40)) == 35
