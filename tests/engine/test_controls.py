"""logit_bias, allowed_token_ids, bad_words and cache_salt, in every mode."""

from __future__ import annotations

from typing import Any

import pytest

from pdray.engine.request import EngineRequest
from pdray.errors import InvalidRequestError
from pdray.sampling_params import SamplingParams

PROMPT = list(range(10, 43))
FEW = (20, 21, 22, 23)
PARAMS = {
    "bias": SamplingParams(temperature=1.0, seed=1, max_tokens=25, ignore_eos=True, logit_bias={30: 5.0, 31: -100.0}),
    "allowed": SamplingParams(temperature=1.0, seed=2, max_tokens=25, allowed_token_ids=FEW),
    "greedy": SamplingParams(
        temperature=0, max_tokens=25, allowed_token_ids=FEW, bad_words_token_ids=((20,), (21, 22))
    ),
    "words": SamplingParams(
        temperature=1.5, seed=3, max_tokens=25, allowed_token_ids=FEW, bad_words_token_ids=((21, 20), (23, 22, 22))
    ),
    "all": SamplingParams(
        n=2,
        temperature=1.0,
        seed=4,
        max_tokens=25,
        min_tokens=9,
        stop_token_ids=(22,),
        allowed_token_ids=(*FEW, 2),
        logit_bias={22: 3.0},
        frequency_penalty=0.5,
        top_k=3,
    ),
    "free": SamplingParams(temperature=1.0, seed=5, max_tokens=25, ignore_eos=True),
}


def requests() -> list[EngineRequest]:
    return [
        EngineRequest(name, PROMPT[: 5 + 4 * i], params, tuple(range(params.n)))
        for i, (name, params) in enumerate(PARAMS.items())
    ]


def answers(engine: Any) -> dict[Any, Any]:
    return {key: dict(indices) for key, indices in engine.tokens.items()}


def holds(ids: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(ids[i : i + len(word)]) == word for i in range(len(ids)))


def test_they_do_what_they_say(llama: Any) -> None:
    engine = llama.engine().run(*requests())
    assert 31 not in engine.ids("bias") and engine.ids("bias").count(30) > engine.ids("free").count(30)
    assert set(engine.ids("allowed")) == set(FEW) and len(engine.ids("allowed")) == 25
    for word in ((21, 20), (23, 22, 22)):
        assert holds(engine.ids("allowed"), word), "else the words show nothing"
        assert not holds(engine.ids("words"), word)
    assert {20, 21} <= set(engine.ids("words"))
    assert 20 not in engine.ids("greedy") and not holds(engine.ids("greedy"), (21, 22))
    for index in range(2):
        ids = engine.ids("all", index)
        assert len(ids) > 9 and not {2, 22}.intersection(ids[:9]) and ids[-1] in (2, 22)
    engine.assert_empty()


@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 9}], ids=["roomy", "preempting"])
def test_steps_planned_ahead_give_the_same_tokens(llama: Any, settings: dict[str, int]) -> None:
    plain = llama.engine(async_scheduling=False, **settings).run(*requests())
    ahead = llama.engine(async_scheduling=True, **settings).run(*requests())
    assert answers(ahead) == answers(plain) == answers(llama.engine().run(*requests()))
    assert not settings or plain.stats().num_preemptions > 0


def test_disaggregated_equals_colocated(llama: Any, disaggregated: Any) -> None:
    pair = disaggregated(llama.engine(), llama.engine(async_scheduling=True))
    assert answers(pair.run(*requests())) == answers(llama.engine().run(*requests()))


@pytest.mark.parametrize("name", ["bias", "words", "greedy"])
def test_a_replay_goes_on_where_the_output_was(llama: Any, name: str) -> None:
    request = next(r for r in requests() if r.key == name)
    whole = llama.engine().run(request).tokens[name][0]
    for cut in (1, 2, 11):
        outputs = tuple(token.token_id for token in whole[:cut])
        again = llama.engine().run(EngineRequest(name, request.prompt_token_ids, request.params, (0,), outputs))
        assert again.tokens[name][0] == whole[cut:]


def test_where_nothing_is_left_the_request_ends(llama: Any) -> None:
    params = SamplingParams(max_tokens=9, seed=1, allowed_token_ids=(20,), bad_words_token_ids=((20, 20, 20),))
    engine = llama.engine()
    engine.run(EngineRequest("r", PROMPT, params), EngineRequest("free", PROMPT, PARAMS["free"]))
    assert engine.ids("r") == [20, 20] and len(engine.ids("free")) == 25
    news = engine.updates["r"][-1]
    assert news.finished and news.param is not None and "no token" in (news.failure or "")
    engine.assert_empty()


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("logit_bias", {"logit_bias": {199: 1.0}}),
        ("allowed_token_ids", {"allowed_token_ids": (4, 199)}),
        ("bad_words", {"bad_words_token_ids": ((4, 199),)}),
        ("bad_words", {"bad_words": ("never tokenized",)}),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(llama: Any, field: str, params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=field) as raised:
        llama.engine().add(EngineRequest("r", PROMPT, SamplingParams(**params)))
    assert raised.value.param == field


def test_prefixes_are_shared_within_a_salt_only(llama: Any) -> None:
    engine = llama.engine()
    hits, ids = [], []
    for key, salt in enumerate((None, "a", "a", "b", None)):
        engine.run(EngineRequest(key, PROMPT, SamplingParams(temperature=0, max_tokens=4, cache_salt=salt)))
        hits.append(engine.updates[key][0].num_cached_tokens)
        ids.append(engine.ids(key))
    assert hits == [0, 0, 32, 0, 32] and all(each == ids[0] for each in ids)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_end_of_sequence_as_the_first_token(llama: Any, disaggregated: Any, ahead: bool) -> None:
    """It ends the completion where the prompt was computed, with its log-probabilities; nothing is decoded."""
    params = SamplingParams(
        n=2, temperature=1.0, seed=1, max_tokens=9, allowed_token_ids=(2,), logprobs=2, prompt_logprobs=1
    )
    asked = EngineRequest("r", PROMPT, params, (0, 1))
    whole = llama.engine(async_scheduling=ahead).run(asked)
    pair = disaggregated(llama.engine(async_scheduling=ahead), llama.engine(async_scheduling=ahead))
    assert answers(pair.run(asked)) == answers(whole)
    for index in range(2):
        [token] = whole.tokens["r"][index]
        assert (token.token_id, token.finish_reason, token.is_text) == (2, "stop", False)
        assert token.logprobs is not None and next(iter(token.logprobs)) == 2 and len(token.logprobs) >= 2
    for engine in (whole, pair.prefill):
        told = [update.prompt_scores for update in engine.updates["r"] if update.prompt_scores is not None]
        assert len(told) == 1 and len(told[0].unpack()) == len(PROMPT) - 1
    assert pair.decode.stats().num_output_tokens == 0
    for engine in (whole, pair.prefill, pair.decode):
        engine.assert_empty()
