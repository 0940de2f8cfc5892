"""When completions end, what must not be drawn, and what is reported beside a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pdray.engine.request import EngineRequest
from pdray.engine.step.reports import unpack_reports
from pdray.kernels.sampling.draw_rows import report
from pdray.kernels.sampling.history import no_history
from pdray.kernels.sampling.rows import WORDS, DrawTable, make_record
from pdray.sampling_params import SamplingParams

PROMPT = list(range(10, 40))


def first_new(ids: list[int]) -> int:
    """Position of the first token that no earlier one equals, from the third on."""
    return next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])


def run(llama: Any, prompt: list[int] = PROMPT, **params: Any) -> Any:
    engine = llama.engine()
    engine.run(EngineRequest("r", prompt, SamplingParams(**{"temperature": 0.0, "max_tokens": 20, **params})))
    engine.assert_empty()
    return engine


def test_a_stop_token_ends_the_completion_and_is_its_last_token(llama: Any) -> None:
    free = run(llama, ignore_eos=True).ids("r")
    cut = first_new(free)
    engine = run(llama, ignore_eos=True, stop_token_ids=(free[cut],))
    last = engine.tokens["r"][0][-1]
    assert engine.ids("r") == free[: cut + 1]
    assert (last.finish_reason, last.stop_reason) == ("stop", free[cut])
    assert all(token.finish_reason is None for token in engine.tokens["r"][0][:-1])
    assert [update.finished for update in engine.updates["r"]] == [False] * cut + [True]


def test_end_of_sequence_ends_the_completion_unless_ignored(llama: Any) -> None:
    engines = {}
    for ignore in (False, True):
        for seed in range(200):  # until a draw hits an end-of-sequence id
            engine = run(llama, temperature=20.0, seed=seed, ignore_eos=ignore)
            if any(token in (2, 3) for token in engine.ids("r")):
                engines[ignore] = engine
                break
    last = engines[False].tokens["r"][0][-1]
    assert last.token_id in (2, 3) and (last.finish_reason, last.stop_reason) == ("stop", None)
    assert not any(token in (2, 3) for token in engines[False].ids("r")[:-1])
    assert len(engines[True].ids("r")) == 20


def test_min_tokens_masks_every_ending_token(llama: Any) -> None:
    free = run(llama, ignore_eos=True).ids("r")
    cut = first_new(free)
    masked = (free[cut], *range(150, 199))
    engine = run(llama, min_tokens=10, stop_token_ids=masked)
    ids = engine.ids("r")
    assert len(ids) >= 11 and not set(ids[:10]) & {2, 3, *masked}
    assert ids[:cut] == free[:cut] or set(free[:cut]) & set(masked)


def test_max_tokens_and_max_model_len_end_with_length(llama: Any) -> None:
    last = run(llama, max_tokens=3, ignore_eos=True).tokens["r"][0][-1]
    assert (last.position, last.finish_reason, last.stop_reason) == (2, "length", None)
    prompt = [7 + i % 100 for i in range(505)]
    engine = run(llama, prompt, max_tokens=None, ignore_eos=True)
    assert len(engine.ids("r")) == 512 - 505
    assert engine.tokens["r"][0][-1].finish_reason == "length"
    assert engine.ids("r") == llama.greedy(prompt, 7)


def test_logprobs_are_those_of_the_raw_logits(llama: Any) -> None:
    engine = run(llama, temperature=3.0, seed=1, logprobs=4, ignore_eos=True, repetition_penalty=1.5)
    ids = engine.ids("r")
    expected = llama.logits(PROMPT + ids).log_softmax(-1)[len(PROMPT) - 1 :]
    for token, row in zip(engine.tokens["r"][0], expected, strict=False):
        assert token.logprobs is not None and next(iter(token.logprobs)) == token.token_id
        top = row.topk(4).indices.tolist()
        assert set(token.logprobs) == {token.token_id, *top}
        for token_id, entry in token.logprobs.items():
            assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
            assert entry.rank == 1 + int((row > row[token_id]).sum())
    assert any(len(token.logprobs) == 5 for token in engine.tokens["r"][0]), "temperature 3 leaves the top 4 at times"


def test_rows_with_and_without_logprobs_are_read_together() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    numbers = [2, None, 0, 5]
    records = [make_record(SamplingParams(temperature=0.0, logprobs=number), 0) for number in numbers]
    words = torch.from_numpy(np.concatenate(records).view(np.int32).reshape(-1, WORDS))
    table = DrawTable(words, no_history(1, 50), torch.zeros(1, 2, dtype=torch.int32))
    rows = unpack_reports(report(logits, table, logits.argmax(-1), 9).numpy(), numbers, 9)
    assert [row.token_id for row in rows] == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1)
    for i, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        if number is None:
            assert row.logprobs is None
            continue
        top = expected[i].topk(max(1, number))
        assert row.logprobs is not None and list(row.logprobs) == top.indices.tolist()
        assert [entry.logprob for entry in row.logprobs.values()] == pytest.approx(top.values.tolist(), abs=1e-6)
        assert [entry.rank for entry in row.logprobs.values()] == list(range(1, len(row.logprobs) + 1))


def test_a_mixed_batch_gives_each_request_its_own_rules(llama: Any) -> None:
    params = {
        "greedy": SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
        "random": SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True),
        "logprobs": SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3),
        "penalty": SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, frequency_penalty=2.0),
        "min": SamplingParams(
            temperature=1.0, seed=9, max_tokens=12, min_tokens=3, stop_token_ids=tuple(range(4, 150))
        ),
    }
    requests = [EngineRequest(key, PROMPT, p) for key, p in params.items()]
    together = llama.engine().run(*requests)
    for request in requests:
        assert llama.engine().run(request).tokens[request.key] == together.tokens[request.key]
    assert together.ids("greedy") == together.ids("logprobs") == llama.greedy(PROMPT, 12)
    assert all(token.logprobs is None for token in together.tokens["greedy"][0])
