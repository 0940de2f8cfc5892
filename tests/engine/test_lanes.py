"""Two lanes over one pool and one copy of the weights give what one lane gives."""

from __future__ import annotations

from typing import Any

import pytest

from pdray.engine.build import make_pool
from pdray.engine.engine import Engine
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.plan import StepPlan
from pdray.engine.step.lane import Lane
from pdray.sampling_params import SamplingParams


class TwoLanes(Engine):
    """Steps with prompts go through a lane of their own."""

    def __init__(self, config: Any, model: Any, device: Any, **kwargs: Any) -> None:
        super().__init__(config, model, make_pool(config, model, device), **kwargs)
        limits = self._scheduler.limits
        shared = {"sampled": self.lane.sampled, "histories": self.lane.histories}
        self.prefill_lane = Lane(model.decoder, self.pool, limits, **shared)
        self.used: list[Lane] = []

    def _lane_for(self, plan: StepPlan) -> Lane:
        self.used.append(self.lane if plan.is_decode else self.prefill_lane)
        return self.used[-1]


def requests() -> list[EngineRequest]:
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, n=2),
        SamplingParams(temperature=0.8, seed=4, max_tokens=5, ignore_eos=True, repetition_penalty=1.2, logprobs=2),
    ]
    return [
        EngineRequest(
            key=number,
            prompt_token_ids=[(7 * number + 3 * i) % 190 for i in range(5 + 40 * number)],
            params=params,
            indices=tuple(range(params.n)),
        )
        for number, params in enumerate(sampling)
    ]


@pytest.mark.parametrize("overlap", [False, True])
def test_two_lanes_equal_one(overlap: bool, llama: Any) -> None:
    one = llama.engine(async_scheduling=overlap).run(*requests())
    two = TwoLanes(one.config, llama.loaded, one.device)
    tokens: dict[tuple[Any, int], list[int]] = {}
    for request in requests():
        two.add(request)
    while two.has_work():
        for update in two.step():
            for token in update.tokens:
                tokens.setdefault((update.key, token.index), []).append(token.token_id)
    assert {lane is two.prefill_lane for lane in two.used} == {True, False}
    for (key, index), ids in tokens.items():
        assert ids == one.ids(key, index)
    assert len(tokens) == 4 and two.check_integrity() == []
