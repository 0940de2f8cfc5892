"""Draws that look at earlier tokens, recomputed one by one from each draw's logits and the tokens as lists."""

from __future__ import annotations

from typing import Any

import pytest

from pdray.engine.request import EngineRequest
from pdray.engine.step.histories import Histories
from pdray.kernels.sampling.sample import SamplingMetadata, SamplingRow, sample
from pdray.sampling_params import SamplingParams
from pdray.testing.every_draw import requests_of

PARAMS = {
    "repetition": SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, repetition_penalty=1.4),
    "frequency": SamplingParams(temperature=0.8, seed=6, max_tokens=30, ignore_eos=True, frequency_penalty=0.7),
    "forks": SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=25, ignore_eos=True, presence_penalty=1.5),
    "filtered": SamplingParams(temperature=1.2, seed=7, top_k=20, top_p=0.9, max_tokens=25, repetition_penalty=0.7),
    "not yet": SamplingParams(temperature=1.0, seed=8, min_tokens=12, max_tokens=25, stop_token_ids=tuple(range(50))),
    "all": SamplingParams(
        temperature=1.1,
        seed=9,
        min_p=0.01,
        min_tokens=9,
        max_tokens=25,
        logprobs=3,
        stop_token_ids=tuple(range(90, 190)),
        presence_penalty=-0.6,
        frequency_penalty=0.4,
        repetition_penalty=1.2,
    ),
    "plain": SamplingParams(temperature=1.0, seed=3, max_tokens=25, ignore_eos=True),
}


def requests() -> list[EngineRequest]:
    return requests_of(PARAMS)


def assert_drawn_as_said(engine: Any, request: EngineRequest) -> int:
    """Each token is what the reference draws from its logits; returns their number."""
    ends = tuple({2, 3, *request.params.stop_token_ids})
    num = 0
    for index in request.indices:
        ids = [*request.output_token_ids, *engine.ids(request.key, index)]
        for position in range(len(request.output_token_ids), len(ids)):
            banned = ends if position < request.params.min_tokens else ()
            seed = (request.params.seed or 0) + index
            row = SamplingRow(request.params, seed, position, request.prompt_token_ids, ids[:position], banned)
            logits = engine.logits[request.key, index, position][None]
            drawn = int(sample(logits, SamplingMetadata.build([row])).token_ids[0])
            assert drawn == ids[position], f"{request.key}, completion {index}, token {position}"
            num += 1
    return num


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("settings", [{"max_num_seqs": 4}, {"num_kv_blocks": 18}], ids=["few places", "preempting"])
def test_every_draw_looks_at_the_tokens_before_it(llama: Any, settings: dict[str, int], overlap: bool) -> None:
    """Where places are few, slots are used again."""
    engine = llama.engine(async_scheduling=overlap, **settings).run(*requests())
    assert sum(assert_drawn_as_said(engine, request) for request in requests()) > 100
    assert (engine.stats().num_preemptions > 0) == ("num_kv_blocks" in settings)
    engine.assert_empty()


def test_a_replay_goes_on_with_the_tokens_so_far(llama: Any) -> None:
    for name in ("frequency", "all"):
        (request,) = (r for r in requests() if r.key == name)
        whole = llama.engine().run(request).ids(name)
        rest = EngineRequest(name, request.prompt_token_ids, request.params, output_token_ids=tuple(whole[:7]))
        engine = llama.engine(async_scheduling=True).run(rest)
        assert engine.ids(name) == whole[7:] and assert_drawn_as_said(engine, rest) == len(whole) - 7


def test_penalties_do_not_hold_up_the_next_step(llama: Any) -> None:
    """The step after is planned before its token is known, as for plain draws."""
    engine = llama.engine(async_scheduling=True)
    engine.add(requests()[0])
    engine.step()
    engine.step()
    assert len(engine._scheduler.plans_in_flight) == 1 and engine.stats().num_output_tokens == 1
    assert all(s.num_pending == 1 for s in engine._scheduler.running)


def test_slots_are_written_once_and_given_back(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []
    join = Histories.join
    monkeypatch.setattr(
        Histories, "join", lambda self, draw: joined.append(draw.sequence.request.key) or join(self, draw)
    )
    engine = llama.engine(max_num_seqs=4).run(*requests())
    assert sorted(joined) == sorted(["repetition", "frequency", *3 * ["forks"], "filtered", "not yet", "all"])
    histories = engine.lane.histories
    histories.release_ended()
    assert not histories._slots and sorted(histories._free) == [0, 1, 2, 3]
