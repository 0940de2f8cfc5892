"""A leg through a prefill and a decode worker in one process, without Ray: what it computes, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgspec
import pytest
from worker_pairs import PROMPT, SECRET, Pair, finish, make_config

from pdray.actors import told_late
from pdray.actors.decode_worker import DecodeWorker
from pdray.config import Config
from pdray.engine.request import RequestUpdate
from pdray.errors import EngineHungError
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import (
    CloseLease,
    CreditUpdate,
    CreditWanted,
    EndCompletion,
    LeaseDenied,
    LeaseGranted,
    RenewLeases,
    Tokens,
)
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import CancelPrefill, FirstTokens, LeaseConfirmed, PrefillRequest


async def test_the_log_tells_once_what_a_worker_serves_with_what(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    worker = DecodeWorker(pair.decode.config, "decode-1", "i", SECRET, app_name="shop")
    with caplog.at_level("INFO", "pdray.actors.assembly"):
        await worker.start()
    await worker.stop()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "pdray.actors.assembly"]
    model = pair.decode.config.model
    for part in ("DecodeWorker(shop:decode-1)", f"model {model} (float32) on cpu", "40 blocks of 16", "max_num_seqs=4"):
        assert part in line


async def test_a_worker_that_stops_closes_its_engine_once_no_step_can_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lanes hold streams and graphs, which go in order, after what the last steps hand to the host."""
    given = make_config(tmp_path, "auto").model_copy(update={"mode": "colocated", "sm_partition": "on"})
    worker, closed = DecodeWorker(given, "decode-0", "i", SECRET), []
    await worker.start()
    close, loop = worker.engine.close, worker._engine_loop

    def closing() -> None:
        closed.append(loop._thread.is_alive())
        close()

    monkeypatch.setattr(worker.engine, "close", closing)
    await worker.stop()
    await worker.stop()
    split = worker.engine.split_state()
    assert closed == [False] and split is not None and split.ready == ()


async def test_a_whole_answer_comes_in_few_messages(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first two tokens at once, as anybody's; and beside a streamed one every token, in the messages of that."""
    monkeypatch.setattr(told_late, "TOLD_AFTER_S", 3600.0)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    for name, n, num_messages in (("whole", 1, 4), ("both", 2, 4)):  # positions 0, 1, to 17, and 18 with the end
        whole = params if n == 1 else msgspec.structs.replace(params, n=n)
        key = pair.lease(name, PROMPT, whole, prefill_worker_id=None, whole=True)
        await pair.router.wait(lambda: all(len(pair.router.tokens(key, i)) == 20 for i in range(n)))  # noqa: B023
        messages = [m for m in pair.router.messages if isinstance(m, Tokens) and key in [u.key for u in m.updates]]
        assert len(messages) == num_messages
    streamed = pair.lease("streamed", PROMPT, params, prefill_worker_id=None)
    await pair.router.wait(lambda: len(pair.router.tokens(streamed)) == 20)
    assert pair.router.tokens(streamed) == pair.router.tokens(LegKey("whole", 0))
    assert sum(isinstance(m, Tokens) and streamed in [u.key for u in m.updates] for m in pair.router.messages) == 20
    await pair.quiet()


@pytest.mark.parametrize("n", [1, 3])
async def test_disaggregated_leg_equals_a_local_one(pair: Pair, n: int) -> None:
    params = SamplingParams(n=n, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    apart = pair.lease("apart", PROMPT, params)
    await pair.start_prefill(apart, PROMPT, params)
    await pair.router.wait(lambda: all(len(pair.router.tokens(apart, i)) == 12 for i in range(n)))
    local = pair.lease("local", PROMPT, params, prefill_worker_id=None)
    await pair.router.wait(lambda: all(len(pair.router.tokens(local, i)) == 12 for i in range(n)))
    for i in range(n):
        assert pair.router.tokens(apart, i) == pair.router.tokens(local, i)
    await pair.quiet()


async def test_a_completion_that_nobody_wants_more_of_frees_its_place(pair: Pair) -> None:
    """The others of its leg go on as if nothing had happened."""
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    alone = pair.lease("alone", PROMPT, params, prefill_worker_id=None)
    await pair.router.wait(lambda: all(len(pair.router.tokens(alone, i)) == 40 for i in range(2)))
    key = pair.lease("r", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    await pair.router.wait(lambda: len(pair.router.tokens(key, 0)) >= 3)
    pair.router.sessions["decode-0"].send(EndCompletion(*key, 0))
    pair.router.sessions["decode-0"].send(EndCompletion("unknown", 0, 0))
    await pair.router.wait(lambda: len(pair.router.tokens(key, 1)) == 40)
    ended, whole = pair.router.tokens(key, 0), pair.router.tokens(alone, 0)
    assert 3 <= len(ended) < 40 and ended == whole[: len(ended)]
    assert pair.router.tokens(key, 1) == pair.router.tokens(alone, 1)
    await pair.quiet()


async def test_cached_blocks_are_not_sent_again(pair: Pair) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for name in ("one", "two", "ahead"):
        key = pair.lease(name, PROMPT, params)
        await pair.start_prefill(key, PROMPT, params, ahead=name == "ahead")
        await pair.router.wait(lambda key=key: len(pair.router.tokens(key)) == 4)
    grants = [m for m in pair.router.messages if isinstance(m, LeaseGranted)]
    assert [g.num_cached_tokens for g in grants] == [0, 64, 64]
    assert pair.router.tokens(LegKey("one", 0)) == pair.router.tokens(LegKey("two", 0))
    assert pair.router.tokens(LegKey("one", 0)) == pair.router.tokens(LegKey("ahead", 0))
    await pair.quiet()
    sent = (await pair.prefill.describe())["sent"]["decode-0"]
    num_blocks = 5 + 1 + 1  # 70 tokens; of the later prompts all but the last one's block are there already
    assert sent["num_bytes"] == num_blocks * pair.prefill.engine.pool.layout.block_bytes
    assert sent["num_puts"] == 3 * 3 + 3 + 3 and sent["seconds"] >= 0  # 3 chunks, then 1 each; 5 layers, 2 at a time


async def test_only_the_worker_that_decodes_says_how_it_does(tmp_path: Path) -> None:
    """decode_pipeline on a CPU: the decode worker's steps are plain, and it says why; a prefill worker has none."""
    pair = Pair(make_config(tmp_path, "object_store").model_copy(update={"decode_pipeline": "on"}))
    await pair.start()
    await finish(pair, "r", 1)
    state = (await pair.decode.describe())["decode_pipeline"]
    assert state["mode"] == "on" and "cpu has no SMs" in state["unavailable"] and state["num_steps"] == 0
    assert (await pair.prefill.describe())["decode_pipeline"] is None
    await pair.quiet()
    await pair.stop()


async def test_a_prompt_may_be_computed_before_its_lease_is_granted(pair: Pair) -> None:
    """Its layers wait for the lease; and one that is given up before it leaves nothing."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    key = pair.lease("r", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params, ahead=True)
    await pair.router.wait(lambda: len(pair.router.tokens(key)) == 4)
    parts = PROMPT, params, [0], [], "decode-0", 1, 0
    pair.router.sessions["prefill-0"].send(PrefillRequest("denied", 0, *parts, has_lease=False))
    await pair.router.first(FirstTokens, LegKey("denied", 0))
    pair.router.sessions["prefill-0"].send(CancelPrefill("denied", 0))
    pair.router.sessions["prefill-0"].send(LeaseConfirmed("denied", 0, 0))  # too late
    await pair.quiet()


async def test_closing_in_every_state_leaves_nothing(pair: Pair) -> None:
    """Close after a random number of loop turns, so that every state is hit; both sides end clean."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for turns in range(0, 60, 3):
        key = pair.lease(f"leg-{turns}", PROMPT, params)
        await pair.start_prefill(key, PROMPT, params)
        for _ in range(turns):
            await asyncio.sleep(0.001)
        pair.router.sessions["prefill-0"].send(CancelPrefill(*key))
        pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    await pair.quiet()


async def test_a_worker_whose_device_hangs_ends(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event loop lives, and would answer heartbeats for ever."""
    gate = threading.Event()
    step = pair.decode.engine.step
    monkeypatch.setattr(pair.decode.engine, "step", lambda: gate.wait(20) and step())
    watch = asyncio.create_task(pair.decode._end_if_hung(0.2))
    joined = asyncio.create_task(pair.decode.join())
    await asyncio.sleep(0.4)
    assert not watch.done(), "an engine without work may rest"
    pair.lease("r", PROMPT, SamplingParams(temperature=0, max_tokens=4), prefill_worker_id=None)
    with pytest.raises(EngineHungError, match=r"step_timeout_s is 0\.2"):
        await asyncio.wait_for(joined, PATIENCE_S)
    gate.set()
    await watch
    pair.decode._stopped.clear()  # so that the fixture can stop it


async def test_router_death_frees_everything(pair: Pair) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    for i in range(3):
        key = pair.lease(f"leg-{i}", PROMPT, params)
        await pair.start_prefill(key, PROMPT, params)
    await pair.router.wait(lambda: any(isinstance(m, Tokens) for m in pair.router.messages))
    for session in list(pair.router.sessions.values()):
        await session.close()
    await pair.quiet()


async def test_no_credit_is_denied_and_announced(pair: Pair) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    keys = [pair.lease(f"leg-{i}", PROMPT[:20], params, prefill_worker_id=None) for i in range(5)]
    denied = await pair.router.first(LeaseDenied, keys[4])
    assert denied.retriable and denied.credit.free_places == 0

    def told() -> list[int]:
        return [m.credit.free_places for m in pair.router.messages if isinstance(m, CreditUpdate)]

    # Nothing else tells of it but the worker's own steps: the answer, and once there is as much as was asked for.
    pair.router.sessions["decode-0"].send(RenewLeases([], CreditWanted(blocks=3, places=2)))
    await pair.router.wait(lambda: told() == [0])
    pair.router.sessions["decode-0"].send(CloseLease(*keys[0], "test"))
    pair.router.sessions["decode-0"].send(CloseLease(*keys[1], "test"))
    await pair.router.wait(lambda: told() == [0, 2])
    too_long = pair.lease("too-long", [1] * 512, params)
    assert not (await pair.router.first(LeaseDenied, too_long)).retriable
    for key in keys[2:]:
        pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    await pair.quiet()


async def test_one_token_needs_no_decode_worker(pair: Pair) -> None:
    """Its KV stays where it is, and goes when the token was sent."""
    params = SamplingParams(temperature=1.0, seed=7, n=2, max_tokens=1)
    key = pair.lease("leased", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    leased = await pair.router.first(FirstTokens, key)
    await pair.quiet()
    pair.router.sessions["prefill-0"].send(PrefillRequest("alone", 0, PROMPT, params, [0, 1], [], None, 0, 0))
    alone = await pair.router.first(FirstTokens, LegKey("alone", 0))
    assert alone.tokens == leased.tokens and {token.finish_reason for token in alone.tokens} == {"length"}
    await pair.quiet()
    pair.router.sessions["prefill-0"].send(PrefillRequest("gone", 0, PROMPT * 9, params, [0, 1], [], None, 0, 0))
    pair.router.sessions["prefill-0"].send(CancelPrefill("gone", 0))
    await pair.quiet()


async def test_blocks_that_nobody_accounts_for_are_seen(pair: Pair) -> None:
    """A lease that is forgotten without its blocks, and blocks that are given back without their lease."""
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    for number, lose in enumerate((lambda key: pair.decode.leases._leases.pop(key), pair.decode.engine.release)):
        key = pair.lease(f"leg-{number}", PROMPT[:20], params, prefill_worker_id=None)
        await pair.router.first(LeaseGranted, key)
        assert await pair.decode.check_integrity() == []
        lose(key)
        (problem,) = await pair.decode.check_integrity()
        assert f"leg-{number}" in problem
        pair.decode.engine.release(key)
        pair.decode.leases._leases.pop(key, None)
    await pair.quiet()


class ListeningWorker(DecodeWorker):
    """Notes the updates that its loop has come to."""

    def __init__(self) -> None:
        super().__init__(Config(), "decode-0", "1", SECRET)
        self._loop = asyncio.get_running_loop()
        self.heard: list[RequestUpdate] = []

    def _on_updates(self, updates: list[RequestUpdate]) -> None:
        self.heard += updates


async def test_first_tokens_leave_before_the_next_step_but_those_of_the_shortest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine's thread goes on once the loop has told of them; for any other it does not wait."""
    monkeypatch.setattr("pdray.actors.worker.TELL_FIRST_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr("pdray.actors.worker.TELL_FIRST_SHARE", PATIENCE_S / 0.01)
    worker = ListeningWorker()
    told, later = RequestUpdate("r", first_decode_step=0.01), RequestUpdate("r", first_decode_step=1e-9)
    heard = await asyncio.to_thread(lambda: (worker._updates_from_engine([later, told]), list(worker.heard))[1])
    assert heard == [later, told]
    worker._updates_from_engine([later])  # by the loop's own thread, which would wait for itself
    assert worker.heard == heard
    monkeypatch.setattr("pdray.actors.worker.TELL_FIRST_TIMEOUT_S", 0.001)
    worker._updates_from_engine([told])
    assert worker.heard == heard, "a loop that does not come to it is not waited for"
    await asyncio.sleep(0)
    assert worker.heard == [*heard, later, told]
