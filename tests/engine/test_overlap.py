"""Steps planned while the one before them runs: the same tokens as one step at a time, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdray.engine.request import EngineRequest
from pdray.engine.step.graphs import StepGraphs
from pdray.sampling_params import SamplingParams

RULES = {
    "greedy": SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    "ends where it likes": SamplingParams(temperature=1.5, seed=3, max_tokens=60),
    "stops": SamplingParams(temperature=1.0, seed=4, max_tokens=60, stop_token_ids=tuple(range(10, 40))),
    "three": SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=25, ignore_eos=True),
    "penalties": SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, repetition_penalty=1.4),
    "frequency": SamplingParams(temperature=0.8, seed=6, max_tokens=25, ignore_eos=True, frequency_penalty=0.7),
    "filters": SamplingParams(temperature=1.2, seed=7, top_k=20, top_p=0.9, min_p=0.01, max_tokens=25, ignore_eos=True),
    "not yet": SamplingParams(temperature=1.0, seed=8, min_tokens=12, max_tokens=25, stop_token_ids=tuple(range(50))),
    "logprobs": SamplingParams(temperature=1.0, seed=9, logprobs=3, max_tokens=25, ignore_eos=True),
    "one": SamplingParams(temperature=0, max_tokens=1),
}


def requests() -> list[EngineRequest]:
    return [
        EngineRequest(name, [5 + (7 * i + j) % 150 for j in range(3 + 9 * i)], params, tuple(range(params.n)))
        for i, (name, params) in enumerate(RULES.items())
    ]


def answers(engine: Any) -> dict[Any, Any]:
    return {key: dict(indices) for key, indices in engine.tokens.items()}


@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 18, "max_num_seqs": 8}], ids=["roomy", "preempting"])
def test_every_kind_of_request_gets_the_same_tokens(llama: Any, settings: dict[str, int]) -> None:
    plain = llama.engine(async_scheduling=False, **settings).run(*requests())
    ahead = llama.engine(async_scheduling=True, **settings).run(*requests())
    assert answers(plain).keys() == RULES.keys()
    assert answers(ahead) == answers(plain)
    if settings:
        assert plain.stats().num_preemptions > 0 and ahead.stats().num_preemptions > 0
    for engine in (plain, ahead):
        engine.assert_empty()


def test_padded_steps_give_the_same_tokens(llama: Any) -> None:
    """As for graphs and launched steps on CUDA; here the same code computes them."""
    plain = llama.engine(async_scheduling=False).run(*requests())
    padded = llama.engine(async_scheduling=True)
    padded.lane.graphs = StepGraphs(torch.empty(8, 199), max_num_batched_tokens=64)
    assert answers(padded.run(*requests())) == answers(plain)


def test_disaggregated_engines_that_plan_ahead_give_the_same_tokens(llama: Any, disaggregated: Any) -> None:
    whole = llama.engine(async_scheduling=False).run(*requests())
    pair = disaggregated(llama.engine(async_scheduling=True), llama.engine(async_scheduling=True, max_num_seqs=16))
    decode = pair.run(*requests())
    assert answers(decode) == answers(whole)
    decode.assert_empty()
