"""Whatever the engine does with a request, its tokens are those of a naive loop over transformers, and its logits
do not depend, to the bit, on what else is in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams


def tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids: list[int] = torch.randint(4, 199, (length,), generator=generator).tolist()
    return ids


def greedy(key: str, prompt: list[int], max_tokens: int = 20, n: int = 1, **fields: Any) -> EngineRequest:
    params = SamplingParams(n=n, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(key, prompt, params, tuple(range(n)), **fields)


def assert_equals_transformers(model: Any, engine: Any, request: EngineRequest) -> None:
    """Tokens and logits of every completion."""
    prompt, max_tokens = request.prompt_token_ids, request.params.max_tokens
    expected = model.greedy(prompt, max_tokens)
    expected_logits = model.logits(prompt + expected)
    for index in request.indices:
        assert engine.ids(request.key, index) == expected
        for position in range(max_tokens):
            logits = engine.logits[request.key, index, position]
            torch.testing.assert_close(logits, expected_logits[len(prompt) - 1 + position], atol=1e-4, rtol=1e-4)


def assert_same_bits(engine: Any, alone: Any, request: EngineRequest) -> None:
    """Logits equal those of an engine that computed the request by itself."""
    for index in request.indices:
        for position in range(request.params.max_tokens or 0):
            assert torch.equal(engine.logits[request.key, index, position], alone.logits[request.key, index, position])


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3"])
def test_mixed_prompts_in_one_batch(tiny_model: Callable[[str], Any], architecture: str) -> None:
    model = tiny_model(architecture)
    requests = [greedy(f"r{n}", tokens(n)) for n in (1, 7, 16, 17, 48, 100)]
    engine = model.engine(max_num_batched_tokens=512).run(*requests)
    for request in requests:
        assert_equals_transformers(model, engine, request)
        assert_same_bits(engine, model.engine(max_num_batched_tokens=512).run(request), request)
    engine.assert_empty()


@pytest.mark.parametrize("budget", [8, 13, 64])
def test_prompts_in_chunks_beside_running_decodes(llama: Any, budget: int) -> None:
    requests = [greedy(f"r{n}", tokens(n)) for n in (5, 90, 33, 64)]
    engine = llama.engine(max_num_batched_tokens=budget).run(*requests)
    for request in requests:
        assert_equals_transformers(llama, engine, request)
        assert_same_bits(engine, llama.engine(max_num_batched_tokens=512).run(request), request)
    engine.assert_empty()


def test_late_arrivals_join_the_running_batch(llama: Any) -> None:
    engine = llama.engine()
    requests = [greedy(f"r{i}", tokens(10 + 9 * i, i)) for i in range(12)]
    for request in requests:
        engine.add(request)
        engine.step()
    engine.run()
    for request in requests:
        assert_equals_transformers(llama, engine, request)
    engine.assert_empty()


def test_prefix_hits(llama: Any) -> None:
    engine = llama.engine()
    shared = tokens(40)
    first, same, longer = greedy("first", shared), greedy("same", shared), greedy("longer", shared[:33] + tokens(20, 1))
    whole_blocks = greedy("whole", shared[:32])
    cached = {}
    for request in (first, same, longer, whole_blocks):
        engine.run(request)
        cached[request.key] = engine.updates[request.key][0].num_cached_tokens
        assert_equals_transformers(llama, engine, request)
        assert_same_bits(engine, llama.engine().run(request), request)
    assert cached == {"first": 0, "same": 32, "longer": 32, "whole": 16}
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (40 + 40 + 53 + 32, 80)
    with engine._lock:  # whoever asks for room does not wait for a step that is planned or booked
        assert engine.room()._asdict().items() <= dataclasses.asdict(stats).items()
    answer = greedy("continued", shared + engine.ids("first") + [7])
    engine.run(answer)
    assert engine.updates["continued"][0].num_cached_tokens == 48, "outputs are cached too"
    assert_equals_transformers(llama, engine, answer)
    engine.assert_empty()


def test_without_prefix_caching_nothing_is_shared(llama: Any) -> None:
    engine = llama.engine(enable_prefix_caching=False)
    for key in ("a", "b"):
        engine.run(greedy(key, tokens(40)))
        assert engine.updates[key][0].num_cached_tokens == 0
        assert_equals_transformers(llama, engine, greedy(key, tokens(40)))


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_and_resumed(llama: Any, caching: bool) -> None:
    engine = llama.engine(num_kv_blocks=13, enable_prefix_caching=caching, max_num_batched_tokens=40)
    requests = [greedy(f"r{i}", tokens(14 + i, i), max_tokens=50) for i in range(4)]
    engine.run(*requests)
    assert engine.stats().num_preemptions > 0
    for request in requests:
        assert_equals_transformers(llama, engine, request)
        assert_same_bits(engine, llama.engine().run(request), request)
        positions = [token.position for token in engine.tokens[request.key][0]]
        assert positions == list(range(50)), "recomputing announces nothing twice"
    engine.assert_empty()


@pytest.mark.parametrize("length", [1, 16, 30, 70])
def test_completions_of_one_prompt(llama: Any, length: int) -> None:
    request = greedy("r", tokens(length), n=3)
    engine = llama.engine().run(request)
    assert engine.stats().num_prompt_tokens == length, "the prompt is computed once"
    assert_equals_transformers(llama, engine, request)
    engine.assert_empty()


def test_completions_are_preempted_one_by_one(llama: Any) -> None:
    engine = llama.engine(num_kv_blocks=11)
    request = greedy("r", tokens(40), max_tokens=60, n=3)
    engine.run(request)
    assert engine.stats().num_preemptions > 0
    assert_equals_transformers(llama, engine, request)
    engine.assert_empty()


@pytest.mark.parametrize("seed", [2**63 - 1, -2, -(2**63)])
def test_a_replay_goes_on_where_the_first_run_stopped(llama: Any, seed: int) -> None:
    params = SamplingParams(
        temperature=0.9, seed=seed, max_tokens=24, ignore_eos=True, frequency_penalty=0.5, logprobs=2
    )
    whole = llama.engine().run(EngineRequest("r", tokens(21), params, (3,)))
    for cut in (1, 11, 23):
        replay = EngineRequest("r", tokens(21), params, (3,), output_token_ids=tuple(whole.ids("r", 3)[:cut]))
        assert llama.engine().run(replay).tokens["r"][3] == whole.tokens["r"][3][cut:]


def test_random_draws_do_not_depend_on_the_batch_and_differ_by_index(llama: Any) -> None:
    def request(key: str, seed: int, n: int = 1) -> EngineRequest:
        params = SamplingParams(n=n, temperature=1.0, top_p=0.9, top_k=50, seed=seed, max_tokens=20, ignore_eos=True)
        return EngineRequest(key, tokens(30), params, tuple(range(n)))

    batch = llama.engine().run(request("a", 5, n=3), greedy("b", tokens(12)), request("c", 7))
    outputs = [batch.ids("a", index) for index in range(3)]
    assert len({tuple(ids) for ids in outputs}) == 3
    for index in range(3):
        alone = llama.engine().run(request("x", 5 + index))
        assert alone.ids("x") == outputs[index], "completion i draws with seed + i"
    assert batch.ids("c") == outputs[2]
    assert batch.ids("b") == llama.greedy(tokens(12), 20)
