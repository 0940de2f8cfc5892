"""Log-probabilities of a prompt's tokens: transformers' on the same weights, in every mode, and told once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdray.engine.request import EngineRequest
from pdray.engine.step.graphs import StepGraphs
from pdray.errors import InvalidRequestError
from pdray.prompt_scores import PromptScores
from pdray.sampling_params import SamplingParams

LONG = [(7 * i) % 150 + 5 for i in range(150)]  # three chunks of 64 tokens
PARAMS = {
    "long": SamplingParams(temperature=0, max_tokens=60, prompt_logprobs=3, ignore_eos=True),
    "short": SamplingParams(temperature=1.0, seed=3, max_tokens=60, prompt_logprobs=0, logprobs=2),
    "one": SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=2),
    "two": SamplingParams(n=2, temperature=1.0, seed=4, max_tokens=10, prompt_logprobs=20),
    "free": SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
}
PROMPTS = {"long": LONG, "short": LONG[:9], "one": [17], "two": LONG[3:40], "free": LONG[5:70]}


def requests() -> list[EngineRequest]:
    return [EngineRequest(key, PROMPTS[key], params, tuple(range(params.n))) for key, params in PARAMS.items()]


def scores_of(engine: Any) -> dict[Any, list[PromptScores]]:
    """What each request was told, in how many updates."""
    told = {
        key: [u.prompt_scores for u in updates if u.prompt_scores is not None]
        for key, updates in engine.updates.items()
    }
    return {key: scores for key, scores in told.items() if scores}


def assert_right(llama: Any, engine: Any) -> None:
    told = scores_of(engine)
    assert told.keys() == PARAMS.keys() - {"free"} and all(len(scores) == 1 for scores in told.values())
    for key, [scores] in told.items():
        prompt, num_top = PROMPTS[key], PARAMS[key].prompt_logprobs
        rows = scores.unpack()
        assert len(rows) == len(prompt) - 1 and scores.num_top == num_top
        expected = llama.logits(prompt).log_softmax(-1)
        for row, token_id, logprobs in zip(rows, prompt[1:], expected, strict=False):
            assert next(iter(row)) == token_id and set(row) == {token_id, *logprobs.topk(num_top).indices.tolist()}
            for each, entry in row.items():
                assert entry.logprob == pytest.approx(float(logprobs[each]), abs=1e-4)
                assert entry.rank == 1 + int((logprobs > logprobs[each]).sum())


def test_padded_steps_give_the_same_scores(llama: Any) -> None:
    """As on CUDA; here the same code computes them."""
    engine, shapes = llama.engine(async_scheduling=True), []
    engine.lane.graphs = StepGraphs(torch.empty(8, 199), max_num_batched_tokens=64)
    forward = engine.lane._compute_scored
    engine.lane._compute_scored = lambda inputs, *rest: shapes.append(inputs) or forward(inputs, *rest)
    assert_right(llama, engine.run(*requests()))
    assert any(inputs.shape.num_draws > len(inputs.num_logprobs) for inputs in shapes)
    assert all(inputs.shape.num_seqs == len(inputs.attention.query_lens) for inputs in shapes)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 16}, {"max_num_seqs": 3}], ids=["roomy", "preempting", "3"])
def test_they_are_transformers_own(llama: Any, settings: dict[str, int], overlap: bool) -> None:
    engine = llama.engine(async_scheduling=overlap, **settings).run(*requests())
    assert_right(llama, engine)
    assert (engine.stats().num_preemptions > 0) == ("num_kv_blocks" in settings)
    plain = llama.engine()
    for request in requests():
        fields = {name: getattr(request, name) for name in EngineRequest.__dataclass_fields__}
        values = {name: getattr(request.params, name) for name in SamplingParams.__struct_fields__}
        plain.run(EngineRequest(**{**fields, "params": SamplingParams(**{**values, "prompt_logprobs": None})}))
    assert engine.tokens == plain.tokens, "the draws are what they are without"
    engine.assert_empty()


def test_what_is_cached_is_computed_again(llama: Any) -> None:
    engine = llama.engine().run(EngineRequest("before", LONG, PARAMS["free"]))
    engine.run(*requests())
    assert_right(llama, engine)
    assert engine.updates["long"][0].num_cached_tokens == 0
    engine.run(EngineRequest("after", LONG, PARAMS["free"]))
    assert engine.updates["after"][0].num_cached_tokens == 144


def test_the_prefill_engine_tells_them(llama: Any, disaggregated: Any) -> None:
    pair = disaggregated(llama.engine(), llama.engine(async_scheduling=True, num_kv_blocks=40))
    pair.run(*requests())
    assert_right(llama, pair.prefill)
    assert not scores_of(pair.decode)


def test_a_replay_scores_the_prompt_alone(llama: Any) -> None:
    whole = llama.engine().run(requests()[0]).ids("long")
    engine = llama.engine().run(EngineRequest("long", LONG, PARAMS["long"], (0,), tuple(whole[:5])))
    assert engine.ids("long") == whole[5:] and len(scores_of(engine)["long"][0].unpack()) == len(LONG) - 1


def test_more_than_a_message_holds_is_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdray.prompt_scores.MAX_BYTES", 1000)
    with pytest.raises(InvalidRequestError, match=r"prompt_logprobs is 3, .* 150 tokens, and 1,000") as raised:
        llama.engine().add(requests()[0])
    assert raised.value.param == "prompt_logprobs"
