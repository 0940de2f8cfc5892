"""The engine's door: states, releases, stats, threads, refusals."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch

from pdray.config import Config
from pdray.engine.loop import EngineLoop
from pdray.engine.request import EngineRequest, RequestUpdate
from pdray.engine.step.draws import Draws
from pdray.errors import InvalidRequestError, StepFailedError
from pdray.outputs import SampledToken
from pdray.sampling_params import SamplingParams


def request(key: Any, length: int = 20, max_tokens: int | None = 10, n: int = 1, **fields: Any) -> EngineRequest:
    params = SamplingParams(n=n, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(key, [4 + (7 * length + i) % 190 for i in range(length)], params, tuple(range(n)), **fields)


@pytest.mark.parametrize(
    "state", ["queued", "prefilling", "decoding", "reserved", "joining", "preempted", "held", "finished"]
)
def test_release_in_every_state_leaves_nothing(llama: Any, state: str) -> None:
    engine = llama.engine(max_num_batched_tokens=16, num_kv_blocks=14 if state == "preempted" else 50)
    if state == "reserved":
        assert engine.reserve(request("r", 40, n=3)) is not None
    elif state == "joining":
        engine.reserve(request("r", 40, n=3))
        engine.start_decode("r", [SampledToken(index, 0, 5) for index in range(3)])
    elif state == "preempted":
        for key in ("r", "s"):
            engine.add(request(key, 40 if key == "r" else 41, 120))
        for _ in range(300):
            engine.step()
            if engine.stats().num_preemptions:
                break
        assert engine.stats().waiting == 1
        engine.release("s")  # the younger
    else:
        engine.add(request("r", 40, n=3, prefill_only=state == "held"))
        for _ in range({"queued": 0, "prefilling": 2, "decoding": 5, "held": 5, "finished": 30}[state]):
            engine.step()
    if state == "held":
        assert engine.stats().free_blocks == 49 - 3 and not engine.has_work()
    engine.release("r")
    engine.release("r")
    assert not engine.has_work()
    assert engine.step() == []
    engine.assert_empty()


def test_release_during_the_step_frees_at_its_end_and_announces_nothing(llama: Any) -> None:
    engine = llama.engine()
    engine.add(request("r"))
    engine.add(request("s", 21))
    seen = []

    def release(logits: torch.Tensor) -> None:
        engine.release("r")
        seen.append((engine.stats().free_blocks, engine.check_integrity()))

    engine.lane.on_logits = release
    updates = engine.step()
    assert seen == [(199 - 4, [])]
    assert [update.key for update in updates] == ["s"] and engine.stats().free_blocks == 199 - 2
    engine.run()
    engine.assert_empty()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_a_completion_that_is_no_longer_wanted_ends_with_its_next_token(
    llama: Any, overlap: bool, num_steps: int
) -> None:
    """Queued, in the midst of its prompt, or decoding; the other one goes on."""
    engine, whole = (llama.engine(max_num_batched_tokens=16, async_scheduling=overlap) for _ in range(2))
    whole.run(request("r", 20, n=2))
    engine.add(request("r", 20, n=2))
    for _ in range(num_steps):
        engine.step()
    engine.end_completion("r", 1)
    engine.end_completion("r", 7)
    engine.end_completion("unknown", 0)
    before = len(engine.ids("r", 1)) if num_steps > 2 else 0
    engine.run()
    assert engine.ids("r", 0) == whole.ids("r", 0)
    ended = engine.ids("r", 1)
    assert before < len(ended) <= before + 3 and ended == whole.ids("r", 1)[: len(ended)]
    engine.assert_empty()


def test_stats_follow_a_request(llama: Any) -> None:
    engine = llama.engine(max_num_batched_tokens=16)
    engine.add(request("r", 40, n=2))
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.queued_tokens, stats.free_places) == (2, 0, 40, 8)
    engine.step()
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.queued_tokens, stats.free_places) == (0, 1, 24, 6)
    assert stats.free_blocks == 199 - 4
    assert engine.reserve(request("s", 16, n=2)) is not None
    engine.step()
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.reserved, stats.queued_tokens, stats.free_places) == (2, 1, 0, 4)
    assert (stats.num_steps, stats.num_prompt_tokens, stats.num_output_tokens) == (3, 40, 2)
    engine.release("s")
    engine.run()
    assert engine.stats().num_output_tokens == 20
    engine.assert_empty()


def test_work_that_waits_for_others_is_no_work(llama: Any) -> None:
    engine = llama.engine(num_kv_blocks=8, max_num_seqs=2)
    engine.reserve(request("lease", 60, 20))
    engine.add(request("r", 60))
    assert engine.has_work() and engine.step() == [] and not engine.has_work()
    engine.release("lease")
    assert engine.has_work()
    engine.run()
    assert len(engine.ids("r")) == 10
    engine.assert_empty()


def test_a_step_without_work_returns_at_once(llama: Any) -> None:
    engine = llama.engine()
    assert not engine.has_work() and engine.step() == [] and engine.stats().num_steps == 0


def test_refusals_name_what_to_change(llama: Any) -> None:
    engine = llama.engine(num_kv_blocks=10, max_model_len=512)
    for enter in (engine.add, engine.reserve):
        with pytest.raises(InvalidRequestError, match=r"144 tokens.*max_model_len \(144\); shorten it$") as refused:
            enter(request("r", 144, 1))
        assert refused.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match="max_tokens 200, n 8.*holds 144; lower n or shorten") as refused:
        engine.reserve(request("r", 20, 200, n=8))
    assert refused.value.param == "n"
    with pytest.raises(InvalidRequestError, match="token id 199 is outside the vocabulary"):
        engine.reserve(EngineRequest("r", [199], SamplingParams()))
    with pytest.raises(KeyError, match="not reserved"):
        engine.start_prefill("r")
    engine.assert_empty()


def test_reserve_and_prefill_here_equals_add(llama: Any) -> None:
    added, reserved = llama.engine(), llama.engine()
    added.run(request("r", 37, n=2))
    assert reserved.reserve(request("r", 37, n=2)) is not None
    assert not reserved.has_work()
    reserved.start_prefill("r")
    reserved.run()
    assert reserved.tokens == added.tokens
    assert reserved.updates["r"][0].prefill_queue is not None
    reserved.assert_empty()


def test_loop_under_concurrent_traffic(llama: Any) -> None:
    """Threads add, reserve and release while the loop runs; who is not released gets the tokens of running alone."""
    engine = llama.engine(num_kv_blocks=40, max_num_seqs=6, max_num_batched_tokens=32)
    alone = {length: llama.engine().run(request("r", length)).ids("r") for length in range(5, 45)}
    finished: dict[Any, list[int]] = {}
    tokens: dict[Any, list[int]] = {}
    problems: list[str] = []
    done = threading.Condition()

    def on_updates(updates: list[RequestUpdate]) -> None:
        with done:
            for update in updates:
                tokens.setdefault(update.key, []).extend(token.token_id for token in update.tokens)
                if update.finished:
                    finished[update.key] = tokens[update.key]
            done.notify_all()

    kept: dict[Any, int] = {}

    def client(number: int) -> None:
        rng = random.Random(number)
        for i in range(15):
            key, length = (number, i), rng.randrange(5, 45)
            if rng.random() < 0.5:
                engine.add(request(key, length))
            elif engine.reserve(request(key, length)) is not None:
                engine.start_prefill(key)
            else:
                continue
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.01)
                engine.release(key)
            else:
                kept[key] = length
            problems.extend(engine.check_integrity())

    loop = EngineLoop(engine, on_updates)
    loop.start()
    clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    with done:
        assert done.wait_for(lambda: finished.keys() >= kept.keys(), timeout=60)
    loop.stop()
    assert problems == []
    assert {key: finished[key] for key in kept} == {key: alone[length] for key, length in kept.items()}
    assert loop.seconds_since_progress() == 0.0
    engine.assert_empty()


def test_a_failing_step_ends_the_loop_and_is_reported(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.engine()
    errors: list[BaseException] = []
    reported = threading.Event()

    def fail(_: Draws) -> None:
        raise RuntimeError("broken device")

    def on_error(error: BaseException) -> None:
        errors.append(error)
        reported.set()

    monkeypatch.setattr(Draws, "read", fail)
    loop = EngineLoop(engine, lambda updates: None, on_error)
    loop.start()
    engine.add(request("r"))
    assert reported.wait(30)
    assert [str(error) for error in errors] == ["RuntimeError: broken device"]
    assert isinstance(errors[0], StepFailedError) and list(errors[0].keys) == ["r"]
    assert str(errors[0].__cause__) == "broken device"
    time.sleep(0.01)
    assert loop.seconds_since_progress() > 0
    loop.stop()


def test_the_loop_stops_in_the_midst_of_work(llama: Any) -> None:
    engine = llama.engine()
    stepped = threading.Event()
    loop = EngineLoop(engine, lambda updates: stepped.set())
    loop.start()
    engine.add(request("r", 20, 400))
    assert stepped.wait(30)
    loop.stop()
    loop.stop()
    assert engine.stats().running == 1
    engine.release("r")
    engine.assert_empty()


def test_a_step_that_was_only_launched_is_no_news(llama: Any) -> None:
    """Each booked step is told of, also one without updates: what it used may have come back."""
    engine = llama.engine(async_scheduling=True)
    engine.add(request("r", 4, 3))
    told, booked = [], []
    done = threading.Event()

    def on_updates(updates: list[RequestUpdate]) -> None:
        told.append(updates)
        booked.append(engine.stats().num_steps)
        if any(update.finished for update in updates):
            done.set()

    loop = EngineLoop(engine, on_updates)
    loop.start()
    assert done.wait(30)
    loop.stop()
    assert booked == list(range(1, len(told) + 1)), "once for each booked step"
    assert sum(len(update.tokens) for updates in told for update in updates) == 3


def test_a_loop_that_never_started_stops(llama: Any) -> None:
    EngineLoop(llama.engine(), lambda updates: None).stop()


def test_the_pool_has_the_documented_shape(llama: Any) -> None:
    engine = llama.engine(block_size=32, num_kv_blocks=9)
    assert engine.pool.tensor.shape == (3, 9, 2, 32, 2, 8) and engine.pool.tensor.dtype == torch.float32
    assert (engine.num_blocks, engine.block_size, engine.max_model_len) == (9, 32, 256)
    assert isinstance(engine.config, Config)
    r = request("r", 70)
    engine.run(r)
    assert engine.ids("r") == llama.greedy(r.prompt_token_ids, 10)


@pytest.mark.parametrize("num_kv_blocks", [2, 5, 32, 33])
def test_max_model_len_is_what_the_pool_holds_and_all_of_it_can_be_used(
    llama: Any, num_kv_blocks: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts of every length up to it end with every token that is left, whoever computes them."""
    engine = llama.engine(num_kv_blocks=num_kv_blocks)
    held = (num_kv_blocks - 1) * 16
    assert engine.max_model_len == min(512, held)
    assert (f"num_kv_blocks ({num_kv_blocks}) holds no longer sequence; raise it to 33" in caplog.text) == (held < 512)
    for length in (max(1, engine.max_model_len - 17), engine.max_model_len - 1):
        engine.add(request("added", length, 1000))
        engine.run()
        assert engine.reserve(request("reserved", length, 1000)) is not None
        engine.start_prefill("reserved")
        engine.run()
        assert len(engine.ids("added")) == len(engine.ids("reserved")) == engine.max_model_len - length
        for key in ("added", "reserved"):
            engine.tokens.pop(key)
    with pytest.raises(InvalidRequestError, match="no room for output"):
        engine.add(request("r", engine.max_model_len))
    engine.assert_empty()
