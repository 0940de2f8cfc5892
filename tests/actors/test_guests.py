"""A prefill worker that computes in its decode worker's memory: what it says, what it holds, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_pairs import PROMPT, SECRET, LocalActor, Pair, finish, make_config

from pdray.actors.prefill_worker import PrefillWorker
from pdray.config import Config
from pdray.engine.request import Reservation
from pdray.errors import HandshakeError, TransferError
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import CloseLease, LeaseGranted, Tokens
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import CancelPrefill, FirstTokens, PrefillFailed, PrefillRequest

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Any]:
    pair = Pair(make_config(tmp_path, "shared"))
    await pair.start()
    yield pair
    for worker in (pair.prefill, pair.decode):
        worker._stopped.clear()  # one that has failed is stopped, too
        worker._tasks.cancel()
    await pair.stop()


def hold_step(pair: Pair) -> tuple[threading.Event, threading.Event]:
    """The guest's next step waits, launched, for the first event; the second says that it does."""
    gate, entered = threading.Event(), threading.Event()
    launch = pair.prefill.engine.lane.launch

    def hold(*arguments: Any) -> Any:
        entered.set()
        assert gate.wait(PATIENCE_S)
        return launch(*arguments)

    pair.prefill.engine.lane.launch = hold  # type: ignore[method-assign]
    return gate, entered


async def held(pair: Pair) -> int:
    """Blocks of the decode worker that somebody may use or write."""
    stats = pair.decode.engine.stats()
    return stats.num_blocks - 1 - stats.free_blocks


async def local(pair: Pair, name: str, prompt: list[int], params: SamplingParams) -> LegKey:
    """The same request, computed by the decode worker alone."""
    key = pair.lease(name, prompt, params, prefill_worker_id=None)
    await pair.router.wait(lambda: all(len(pair.router.tokens(key, i)) == params.max_tokens for i in range(params.n)))
    return key


async def apart(pair: Pair, name: str, prompt: list[int], params: SamplingParams) -> LegKey:
    key = pair.lease(name, prompt, params)
    await pair.start_prefill(key, prompt, params)
    await pair.router.wait(lambda: all(len(pair.router.tokens(key, i)) == params.max_tokens for i in range(params.n)))
    return key


async def test_the_two_have_one_pool_and_one_copy_of_the_weights(pair: Pair) -> None:
    """What one writes the other reads; and the guest has nothing to send."""
    guest, lender = pair.prefill.engine, pair.decode.engine
    lender.pool.tensor[2, 7, 1, 3] = 5.0
    assert torch.equal(guest.pool.tensor[2, 7, 1, 3], lender.pool.tensor[2, 7, 1, 3])
    assert guest.pool.tensor.data_ptr() != lender.pool.tensor.data_ptr(), "two mappings"
    ours, theirs = (engine.model.decoder.embed_tokens.weight for engine in (guest, lender))
    theirs[3, 4] = 0.25
    assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    assert pair.prefill.info.fingerprint == pair.decode.info.fingerprint
    state = await pair.prefill.describe()
    assert state["channels"] == {"decode-0": "shared"} and state["sent"] == {}
    assert pair.prefill.kinds.keys() == pair.decode.kinds.keys() == {"shared"}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("length", [1, 16, 31, 64, 70])
async def test_it_says_what_the_decode_worker_says_alone(pair: Pair, n: int, length: int) -> None:
    """Of new prompts, in chunks, and of those that are cached in part or wholly: the last block is computed anew."""
    params = SamplingParams(n=n, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    prompt = PROMPT[:length]
    keys = [await apart(pair, f"apart-{i}", prompt, params) for i in range(2)]
    key = await local(pair, "local", prompt, params)
    keys.append(await apart(pair, "after", prompt, params))
    for other in keys:
        assert [pair.router.tokens(other, i) for i in range(n)] == [pair.router.tokens(key, i) for i in range(n)]
    cached = [m.num_cached_tokens for m in pair.router.messages if isinstance(m, LeaseGranted)]
    assert cached[0] == 0 and cached[1:] == [length // 16 * 16] * 3
    computed = [m.num_cached_tokens for m in pair.router.messages if isinstance(m, FirstTokens)]
    assert computed[1:] == [(length - 1) // 16 * 16] * 2, "the prefill worker has what the decode worker had cached"
    await pair.quiet()


async def test_scores_of_a_prompt_and_what_follows_are_those_of_the_decode_worker(pair: Pair) -> None:
    """Scores need every token computed: nothing that is cached is read then."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=2, logprobs=1)
    await apart(pair, "before", PROMPT, GREEDY)
    keys = await apart(pair, "apart", PROMPT, params), await local(pair, "local", PROMPT, params)
    assert pair.router.tokens(keys[0]) == pair.router.tokens(keys[1])
    scores = [(await pair.router.first(FirstTokens, keys[0])).prompt_scores]
    legs = [leg for m in pair.router.messages if isinstance(m, Tokens) for leg in m.updates if leg.key == keys[1]]
    scores += [leg.prompt_scores for leg in legs if leg.prompt_scores is not None]
    assert scores[0] == scores[1] and len(scores) == 2
    await pair.quiet()


async def test_nothing_is_computed_before_the_lease_stands(pair: Pair) -> None:
    parts = PROMPT, GREEDY, [0], [], "decode-0", 1, 0
    pair.router.sessions["prefill-0"].send(PrefillRequest("early", 0, *parts, has_lease=False))
    pair.router.sessions["prefill-0"].send(PrefillRequest("unknown", 0, *parts))
    failed = await pair.router.first(PrefillFailed, LegKey("unknown", 0))
    assert "lease no longer stands" in failed.reason
    assert pair.prefill.engine.stats().num_prompt_tokens == 0 and len(pair.prefill.ledger) == 1
    pair.router.sessions["prefill-0"].send(CancelPrefill("early", 0))
    pair.router.sessions["prefill-0"].send(PrefillRequest("alone", 0, PROMPT, GREEDY, [0], [], None, 0, 0))
    failed = await pair.router.first(PrefillFailed, LegKey("alone", 0))
    assert "no blocks of its own" in failed.reason
    await pair.quiet()


async def test_closing_in_every_state_leaves_nothing(pair: Pair) -> None:
    expected = await finish(pair, "before", 1)
    for turns in range(0, 60, 3):
        prompt = [turns, *PROMPT]
        key = pair.lease(f"leg-{turns}", prompt, GREEDY)
        await pair.start_prefill(key, prompt, GREEDY)
        for _ in range(turns):
            await asyncio.sleep(0.001)
        if turns % 2:
            pair.router.sessions["prefill-0"].send(CancelPrefill(*key))
        pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    await pair.quiet()
    assert await finish(pair, "after", 1) == expected
    await pair.quiet()


async def test_blocks_that_a_step_in_flight_writes_are_nobody_elses(pair: Pair) -> None:
    """Neither a closed lease nor a lost session frees them, nor an abort: only the end of the step."""
    expected = await finish(pair, "before", 1)
    other = [token + 1 for token in PROMPT]
    gate, entered = hold_step(pair)
    key = pair.lease("lost", other, GREEDY)
    await pair.start_prefill(key, other, GREEDY)
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    await asyncio.sleep(0.1)
    assert await held(pair) == 5 and key in pair.prefill._stopping
    await pair.connect(2)
    await asyncio.sleep(0.1)
    assert await held(pair) == 5, "another epoch changes nothing"
    gate.set()
    await pair.quiet()
    assert await finish(pair, "after", 2) == expected
    await pair.quiet()


async def test_a_step_that_fails_at_its_launch_frees_what_it_would_have_written(pair: Pair) -> None:
    """Also when the leg was given up meanwhile, so that there is nothing to tell of it."""
    gate, entered = threading.Event(), threading.Event()
    launch = pair.prefill.engine.lane.launch

    def fail(*_: Any) -> Any:
        entered.set()
        assert gate.wait(PATIENCE_S)
        raise IndexError("index -1")

    pair.prefill.engine.lane.launch = fail  # type: ignore[method-assign]
    key = pair.lease("lost", PROMPT, GREEDY)
    await pair.start_prefill(key, PROMPT, GREEDY)
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    pair.router.sessions["prefill-0"].send(CancelPrefill(*key))
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    await pair.router.wait(lambda: True)
    await asyncio.sleep(0.1)
    assert await held(pair) == 5
    gate.set()
    await pair.quiet()
    pair.prefill.engine.lane.launch = launch  # type: ignore[method-assign]
    await finish(pair, "after", 1)
    await pair.quiet()


async def test_a_guest_that_is_seen_dead_holds_no_blocks_and_its_successor_maps_the_same(pair: Pair) -> None:
    expected = await finish(pair, "before", 1)
    gate, entered = hold_step(pair)
    other = [token + 1 for token in PROMPT]
    key = pair.lease("lost", other, GREEDY)
    await pair.start_prefill(key, other, GREEDY)
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    await asyncio.sleep(0.1)
    assert await held(pair) == 5
    gate.set()  # a process that is gone writes nothing any more
    await pair.prefill.stop()
    await pair.decode.worker_gone("prefill-0", "p1")
    assert await held(pair) == 0
    pair.prefill = PrefillWorker(pair.config, "prefill-0", "p2", SECRET, lender=pair.decode.info)
    await pair.prefill.start()
    await pair.connect(2)
    await pair.router.open(pair.prefill.info)
    assert await finish(pair, "after", 2) == expected
    await pair.quiet()


async def test_router_death_frees_everything(pair: Pair) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    for i in range(3):
        key = pair.lease(f"leg-{i}", [i, *PROMPT], params)
        await pair.start_prefill(key, [i, *PROMPT], params)
    await pair.router.wait(lambda: any(isinstance(m, Tokens) for m in pair.router.messages))
    for session in list(pair.router.sessions.values()):
        await session.close()
    await pair.quiet()


FORGERIES: dict[str, Callable[[list[int]], Reservation]] = {
    "another leg's": lambda blocks: Reservation([blocks[0], *range(30, 34)], 0),
    "the dummy": lambda blocks: Reservation([0, *blocks[1:]], 0),
    "outside": lambda blocks: Reservation([40, *blocks[1:]], 0),
    "negative": lambda blocks: Reservation([-1, *blocks[1:]], 0),
    "twice": lambda blocks: Reservation([blocks[1], *blocks[1:]], 0),
    "too few": lambda blocks: Reservation(blocks[1:], 0),
    "too many": lambda blocks: Reservation([*blocks, 38], 0),
    "all cached": lambda blocks: Reservation(blocks, 80),
    "half a block cached": lambda blocks: Reservation(blocks, 8),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_an_answer_cannot_name_what_is_not_the_legs(
    pair: Pair, forgery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, the leg ends, and the workers go on; its neighbour's blocks are as they were."""
    expected = await finish(pair, "honest", 1)
    gate, entered = hold_step(pair)
    neighbour = pair.lease("neighbour", [5, *PROMPT], GREEDY)
    await pair.start_prefill(neighbour, [5, *PROMPT], GREEDY)
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    blocks = pair.decode.leases._leases[neighbour].reservation.block_ids
    own = [token + 2 for token in PROMPT]
    lend = pair.decode.engine.lend

    def forge(key: Any) -> Reservation:
        true = lend(key)
        return FORGERIES[forgery](blocks if forgery == "another leg's" else true.block_ids)

    monkeypatch.setattr(pair.decode.engine, "lend", forge)
    key = pair.lease("forged", own, GREEDY)
    await pair.start_prefill(key, own, GREEDY)
    failed = await pair.router.first(PrefillFailed, key)
    assert "cannot be right" in failed.reason
    monkeypatch.undo()
    gate.set()
    await pair.router.wait(lambda: len(pair.router.tokens(neighbour)) == 6)
    same = await local(pair, "same", [5, *PROMPT], GREEDY)
    assert pair.router.tokens(neighbour) == pair.router.tokens(same)
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    await pair.quiet()
    assert await finish(pair, "after", 1) == expected
    await pair.quiet()


async def test_who_is_no_guest_of_this_process_is_refused(pair: Pair, tmp_path: Path) -> None:
    """The next decode worker of the same name, a worker with memory of its own, and another model."""
    pair.decode.incarnation = "d2"
    with pytest.raises(HandshakeError, match="in the memory of d1, and this is d2; it must end"):
        await pair.connect(2)
    pair.decode.incarnation = "d1"
    for change, told in (
        ({"block_size": 32}, "differ in weights, dtype, block"),
        ({"dtype": "bfloat16"}, "'s weights take"),
    ):
        other = make_config(tmp_path, "shared").model_copy(update=change)
        with pytest.raises(HandshakeError, match=told):
            await PrefillWorker(other, "prefill-0", "p2", SECRET, lender=pair.decode.info).start()


async def test_memory_of_a_process_that_is_gone_cannot_be_mapped(pair: Pair) -> None:
    import msgspec

    assert pair.decode.info.lends is not None
    gone = msgspec.structs.replace(pair.decode.info.lends, weights="999999999:3:pdray-0")
    info = msgspec.structs.replace(pair.decode.info, lends=gone)
    with pytest.raises(TransferError, match="memory of process 999999999 cannot be mapped"):
        await PrefillWorker(pair.config, "prefill-1", "x", SECRET, lender=info).start()
    away = msgspec.structs.replace(pair.decode.info, lends=msgspec.structs.replace(gone, host="elsewhere"))
    with pytest.raises(TransferError, match="runs on another machine; set channel to auto"):
        await PrefillWorker(pair.config, "prefill-1", "x", SECRET, lender=away).start()


async def test_where_nothing_is_lent_a_guest_has_memory_of_its_own(tmp_path: Path) -> None:
    """auto: the pair gets another kind, and status says why."""
    pair = Pair(make_config(tmp_path, "auto").model_copy(update={"device": "auto", "prefill_num_gpus": 0.5}))
    pair.prefill.lender = await pair.decode.start()
    assert pair.prefill.lender.lends is None
    await pair.prefill.start()
    await pair.connect(1)
    state = await pair.prefill.describe()
    assert (
        state["passed_over"]["decode-0"]["shared"] == "prefill-0 has memory of its own (decode-0 is on another device)"
    )
    await pair.stop()


async def test_a_guest_and_a_worker_with_memory_of_its_own_have_one_decode_worker(tmp_path: Path) -> None:
    """Each has the channel that fits, and they say the same."""
    places = {"prefill_device_id": [0, 1], "decode_device_id": 1, "prefill_num_gpus": 0.5, "decode_num_gpus": 0.5}
    config = make_config(tmp_path, "auto").model_copy(update=places | {"device": "auto", "num_prefill_workers": 2})
    pair = Pair(config)
    await pair.start()
    expected = await finish(pair, "own", 1)
    guest = PrefillWorker(config, "prefill-1", "g1", SECRET, lender=pair.decode.info)
    await guest.start()
    await guest.connect(pair.decode.info, 1, await pair.decode.accept(guest.info, 1), LocalActor(pair.decode))
    channels = [(await worker.describe())["channels"]["decode-0"] for worker in (pair.prefill, guest)]
    assert channels == ["object_store", "shared"]
    await pair.router.open(guest.info)
    key = pair.lease("guest", PROMPT, GREEDY, prefill_worker_id="prefill-1")
    cached = (await pair.router.first(LeaseGranted, key)).num_cached_tokens
    parts = PROMPT, GREEDY, [0], [], "decode-0", 1, cached
    pair.router.sessions["prefill-1"].send(PrefillRequest(*key, *parts))
    await pair.router.wait(lambda: len(pair.router.tokens(key)) == 6)
    assert cached == 64 and pair.router.tokens(key) == expected
    await guest.stop()
    await pair.quiet()
    await pair.stop()


def test_configurations_without_a_common_device_are_refused() -> None:
    with pytest.raises(ValueError, match="num_decode_workers is 2, and a prefill worker computes"):
        Config(channel="shared", num_decode_workers=2)
    with pytest.raises(ValueError, match="do not lie on one GPU; lower prefill_num_gpus"):
        Config(channel="shared")
    Config(channel="shared", device="cpu")
    Config(channel="shared", prefill_num_gpus=0.5, decode_num_gpus=0.5)
