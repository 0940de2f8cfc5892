"""Requests of every kind of draw, for tests that compare two ways to compute the same."""

from __future__ import annotations

from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams

EVERY_DRAW = {
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


def requests_of(draws: dict[str, SamplingParams]) -> list[EngineRequest]:
    """One for each, by its name; the prompts begin alike and have different lengths."""
    return [
        EngineRequest(name, [5 + (7 * i + j) % 150 for j in range(3 + 9 * i)], params, tuple(range(params.n)))
        for i, (name, params) in enumerate(draws.items())
    ]
