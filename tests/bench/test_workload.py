"""Arrivals, lengths and prompts of the load generator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pdray.bench.workload import (
    MOONCAKE_BLOCK_TOKENS,
    poisson_arrivals,
    random_requests,
    read_trace,
    scale_trace,
    trace_requests,
)
from pdray.errors import ConfigError

TOKENS = range(100, 1000)


@pytest.mark.parametrize("burstiness", [0.1, 1.0, 10.0])
def test_arrivals_keep_the_rate_and_the_variation(burstiness: float) -> None:
    """Gaps have mean 1/rate exactly, and the gamma's coefficient of variation, 1/sqrt(burstiness)."""
    arrivals = poisson_arrivals(20_000, 8.0, burstiness, np.random.default_rng(1))
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0.0
    assert (gaps >= 0).all()
    assert arrivals[-1] == pytest.approx(20_000 / 8.0, rel=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.1)


def test_infinite_rate_sends_all_at_once() -> None:
    assert poisson_arrivals(3, float("inf"), 1.0, np.random.default_rng(0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_rate_and_burstiness_must_be_positive(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        poisson_arrivals(3, rate, burstiness, np.random.default_rng(0))


def random_workload(seed: int, range_ratio: float = 0.25, prefix_len: int = 7) -> list:
    return random_requests(
        [0.0] * 200,
        input_len=40,
        output_len=8,
        range_ratio=range_ratio,
        prefix_len=prefix_len,
        token_ids=TOKENS,
        rng=np.random.default_rng(seed),
    )


def test_random_prompts_have_the_lengths_asked_for() -> None:
    requests = random_workload(0)
    prompt_lens = {len(request.prompt_token_ids) - 7 for request in requests}
    assert min(prompt_lens) == 30
    assert max(prompt_lens) == 50
    assert {request.output_len for request in requests} == set(range(6, 11))
    assert len({tuple(request.prompt_token_ids[:7]) for request in requests}) == 1
    assert len({tuple(request.prompt_token_ids[7:20]) for request in requests}) == 200
    assert {token in TOKENS for request in requests for token in request.prompt_token_ids} == {True}


def test_same_seed_same_prompts() -> None:
    assert random_workload(3) == random_workload(3)
    assert random_workload(3) != random_workload(4)


def test_range_ratio_of_zero_is_exact() -> None:
    assert {len(r.prompt_token_ids) for r in random_workload(0, range_ratio=0.0, prefix_len=0)} == {40}


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.5000000,374,44
2023-11-17 00:00:00.7500001,396,109
2023-11-17 00:01:00.5000000,1,1
"""


def test_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "conv.csv"
    path.write_text(AZURE)
    rows = read_trace(path)
    assert [row.arrival_s for row in rows] == pytest.approx([0.0, 1.2500001, 61.0], abs=1e-6)
    assert [(row.input_len, row.output_len) for row in rows] == [(374, 44), (396, 109), (1, 1)]
    assert read_trace(path, num_rows=2) == rows[:2]


def mooncake_file(tmp_path: Path) -> Path:
    lines = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 1030, "output_length": 9, "hash_ids": [0, 1, 7]},
        {"timestamp": 6500, "input_length": 600, "output_length": 2, "hash_ids": [0, 9]},
    ]
    path = tmp_path / "conversation.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_mooncake_prefixes_are_shared_block_by_block(tmp_path: Path) -> None:
    rows = read_trace(mooncake_file(tmp_path))
    first, second, third = trace_requests(rows, TOKENS, seed=0)
    assert [request.arrival_s for request in (first, second, third)] == [0.0, 0.0, 3.5]
    assert [len(request.prompt_token_ids) for request in (first, second, third)] == [1100, 1030, 600]
    shared = 2 * MOONCAKE_BLOCK_TOKENS
    assert first.prompt_token_ids[:shared] == second.prompt_token_ids[:shared]
    assert first.prompt_token_ids[shared:1030] != second.prompt_token_ids[shared:]
    assert first.prompt_token_ids[:512] == third.prompt_token_ids[:512]
    assert first.prompt_token_ids[512:600] != third.prompt_token_ids[512:]


def test_caps_keep_shared_prefixes_and_are_counted(tmp_path: Path) -> None:
    rows = read_trace(mooncake_file(tmp_path))
    capped = scale_trace(rows, time_scale=0.5, max_input_len=700, max_output_len=5)
    assert (capped.num_inputs_cut, capped.num_outputs_cut) == (2, 1)
    assert [row.arrival_s for row in capped.rows] == [0.0, 0.0, 1.75]
    first, second, third = trace_requests(capped.rows, TOKENS, seed=0)
    assert first.prompt_token_ids == second.prompt_token_ids
    assert len(first.prompt_token_ids) == 700
    assert [request.output_len for request in (first, second, third)] == [5, 5, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trace.txt", "", "known are .csv"),
        ("trace.csv", "a,b\n1,2\n", "not what its ending says"),
        ("trace.jsonl", "{}\n", "not what its ending says"),
        ("trace.jsonl", "no json\n", "not what its ending says"),
        ("trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
    ],
)
def test_bad_trace_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


def test_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
