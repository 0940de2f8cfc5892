"""Prefill in one engine and decode in another give exactly what one engine gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams

PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
    "seeded": SamplingParams(temperature=1.2, top_p=0.95, seed=2**62 + 9, max_tokens=20, ignore_eos=True),
    "penalties": SamplingParams(
        temperature=0.8,
        seed=4,
        max_tokens=20,
        ignore_eos=True,
        repetition_penalty=1.3,
        frequency_penalty=0.7,
        presence_penalty=-0.4,
    ),
    "logprobs": SamplingParams(temperature=0.7, seed=4, max_tokens=20, ignore_eos=True, logprobs=5),
    "min_tokens": SamplingParams(
        temperature=1.0, seed=4, max_tokens=20, min_tokens=6, stop_token_ids=tuple(range(4, 60))
    ),
    "one token": SamplingParams(temperature=0.0, max_tokens=1),
}


def tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids: list[int] = torch.randint(4, 199, (length,), generator=generator).tolist()
    return ids


@pytest.mark.parametrize("name", PARAMS)
def test_disaggregated_equals_colocated(llama: Any, disaggregated: Any, name: str) -> None:
    requests = [EngineRequest(f"r{n}", tokens(n), PARAMS[name]) for n in (1, 16, 31, 90)]
    colocated = llama.engine().run(*requests)
    pair = disaggregated(llama.engine(max_num_batched_tokens=24), llama.engine())
    decode = pair.run(*requests)
    for request in requests:
        assert decode.tokens[request.key] == colocated.tokens[request.key]
    for engine in (pair.prefill, pair.decode, colocated):
        engine.assert_empty()
    assert decode.stats().num_prompt_tokens == 0, "decode never computes a prompt"


@pytest.mark.parametrize("length", [5, 32, 45])
@pytest.mark.parametrize("name", ["seeded", "penalties"])
def test_completions_of_one_prompt(llama: Any, disaggregated: Any, name: str, length: int) -> None:
    request = EngineRequest("r", tokens(length), PARAMS[name], (0, 1, 2, 5))
    colocated = llama.engine().run(request)
    pair = disaggregated(llama.engine(), llama.engine())
    assert pair.run(request).tokens == colocated.tokens
    pair.prefill.assert_empty()
    pair.decode.assert_empty()


def test_every_block_of_every_layer_is_announced_once(llama: Any, disaggregated: Any) -> None:
    prefill = llama.engine(max_num_batched_tokens=24, transfer_layer_group=2)
    pair = disaggregated(prefill, llama.engine())
    prompts = [tokens(70), tokens(70), tokens(70)[:40] + tokens(9, 1), tokens(64), tokens(64)]
    for key, prompt in enumerate(prompts):
        request = EngineRequest(key, prompt, PARAMS["greedy"], output_token_ids=(9, 8, 7) if key == 2 else ())
        expected = llama.engine().run(request).tokens[key]
        assert pair.run(request).tokens[key] == expected
        num_blocks = -(-(len(prompt) + len(request.output_token_ids)) // 16)
        received = pair.received[key]
        assert sorted(received) == [(layer, block) for layer in range(3) for block in range(num_blocks)]
    hits = [pair.prefill.updates[key][0].num_cached_tokens for key in range(len(prompts))]
    assert hits == [0, 64, 32, 0, 48]
    reserved = [pair.reservations[key].num_cached_tokens for key in range(len(prompts))]
    assert reserved == [0, 64, 32, 0, 64], "received blocks are cached; a decode engine needs no last token computed"


def test_decode_preempts_what_was_received_and_recovers_it(llama: Any, disaggregated: Any) -> None:
    params = SamplingParams(temperature=1.0, seed=8, max_tokens=70, ignore_eos=True)
    requests = [EngineRequest(i, tokens(20 + i, i), params) for i in range(3)]
    colocated = llama.engine().run(*requests)
    pair = disaggregated(llama.engine(), llama.engine(num_kv_blocks=13, decode_headroom_tokens=8))
    assert pair.run(*requests).tokens == colocated.tokens
    assert pair.decode.stats().num_preemptions > 0
    pair.decode.assert_empty()


def test_timings_of_both_halves(llama: Any, disaggregated: Any) -> None:
    pair = disaggregated(llama.engine(), llama.engine())
    pair.run(EngineRequest("r", tokens(20), PARAMS["greedy"]))
    (prefilled,), decoded = pair.prefill.updates["r"], pair.decode.updates["r"]
    assert prefilled.finished and prefilled.prefill > 0 and prefilled.prefill_queue >= 0
    assert (prefilled.num_cached_tokens, prefilled.join_wait, prefilled.first_decode_step) == (0, None, None)
    assert decoded[0].join_wait >= 0 and decoded[0].first_decode_step > decoded[0].first_launch > 0
    assert all(u.join_wait is None and u.first_decode_step is None for u in decoded[1:])
    assert all(u.prefill is None and u.prefill_queue is None and u.num_cached_tokens is None for u in decoded)
