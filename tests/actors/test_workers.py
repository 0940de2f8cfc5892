"""PrefillWorker and DecodeWorker in one process, without Ray, driven by a scripted router over real sessions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.prefill_worker import PrefillWorker
from pdray.cluster.messages import (
    AnyMessage,
    CancelPrefill,
    CloseLease,
    FirstTokens,
    LeaseDenied,
    LeaseGranted,
    LeaseRequest,
    LegKey,
    PrefillFailed,
    PrefillRequest,
    Tokens,
    WorkerInfo,
)
from pdray.cluster.session import PeerName, Session, connect
from pdray.config import Config
from pdray.errors import HandshakeError
from pdray.sampling_params import SamplingParams
from pdray.transfer.channel import Put
from pdray.transfer.fault_injection import Fault, FaultInjectingChannel

SECRET = b"secret of the test"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 95,
}


class LocalActor:
    """Stands for the decode worker's actor handle: calls run on this loop, and answer like Ray's."""

    def __init__(self, worker: DecodeWorker) -> None:
        self.worker = worker
        self.loop = asyncio.get_running_loop()
        self.receive_blocks = self

    def remote(self, *args: Any) -> Any:
        class Call:
            @staticmethod
            def future() -> Any:
                return asyncio.run_coroutine_threadsafe(self.worker.receive_blocks(*args), self.loop)

        return Call()


class ScriptedRouter:
    """Collects what workers send."""

    def __init__(self) -> None:
        self.messages: list[AnyMessage] = []
        self.arrived = asyncio.Event()
        self.sessions: dict[str, Session] = {}

    def on_open(self, session: Session) -> None:
        self.sessions[session.peer.id] = session

    def on_message(self, session: Session, message: AnyMessage) -> None:
        self.messages.append(message)
        self.arrived.set()

    def on_closed(self, session: Session, reason: str) -> None:
        self.sessions.pop(session.peer.id, None)

    async def open(self, info: WorkerInfo) -> None:
        await connect(
            info.host,
            info.port,
            me=PeerName("router-test", "1"),
            expect=PeerName(info.worker_id, info.incarnation),
            secret=SECRET,
            handler=self,
            timeout_s=5,
        )

    async def wait(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(20):
            while not (result := condition()):
                self.arrived.clear()
                await self.arrived.wait()
        return result

    async def first(self, kind: type, key: LegKey) -> Any:
        def found() -> Any:
            return next((m for m in self.messages if isinstance(m, kind) and getattr(m, "key", None) == key), None)

        return await self.wait(found)

    def tokens(self, key: LegKey, index: int = 0) -> list[int]:
        """Token ids of a completion by position; a position that came twice must agree."""
        by_position: dict[int, int] = {}
        for message in self.messages:
            legs = (
                message.updates
                if isinstance(message, Tokens)
                else [message]
                if isinstance(message, FirstTokens)
                else []
            )
            for leg in legs:
                for token in leg.tokens:
                    if leg.key == key and token.index == index:
                        assert by_position.setdefault(token.position, token.token_id) == token.token_id
        assert sorted(by_position) == list(range(len(by_position)))
        return [by_position[i] for i in range(len(by_position))]


class Pair:
    """A connected prefill and decode worker, and a router with sessions to both."""

    def __init__(self, config: Config) -> None:
        self.prefill = PrefillWorker(config, "prefill-0", "p1", SECRET)
        self.decode = DecodeWorker(config, "decode-0", "d1", SECRET)
        self.router = ScriptedRouter()

    async def start(self) -> None:
        prefill, decode = await self.prefill.start(), await self.decode.start()
        await self.decode.accept(prefill, 1)
        await self.prefill.connect(decode, 1, LocalActor(self.decode))
        await self.router.open(prefill)
        await self.router.open(decode)

    async def stop(self) -> None:
        await self.prefill.stop()
        await self.decode.stop()

    def lease(self, name: str, prompt: list[int], params: SamplingParams, **kwargs: Any) -> LegKey:
        message = LeaseRequest(
            name, 0, prompt, params, list(range(params.n)), [], **{"prefill_worker_id": "prefill-0"} | kwargs
        )
        self.router.sessions["decode-0"].send(message)
        return message.key

    async def start_prefill(self, key: LegKey, prompt: list[int], params: SamplingParams) -> None:
        grant = await self.router.first(LeaseGranted, key)
        self.router.sessions["prefill-0"].send(
            PrefillRequest(
                *key, prompt, params, list(range(params.n)), [], "decode-0", 1, grant.block_ids, grant.num_cached_tokens
            )
        )

    async def quiet(self) -> None:
        """Returns once both workers hold nothing; fails if that does not come."""
        async with asyncio.timeout(10):
            while True:
                stats = [self.prefill.engine.stats(), self.decode.engine.stats()]
                if (
                    all(s.free_blocks == s.num_blocks - 1 and not s.running and not s.waiting for s in stats)
                    and not len(self.prefill.ledger)
                    and not self.decode.leases.leases(0.0)
                ):
                    break
                await asyncio.sleep(0.02)
        assert await self.prefill.check_integrity() == [] and await self.decode.check_integrity() == []


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    model = tmp_path / "config.json"
    model.write_text(json.dumps(TINY))
    pair = Pair(
        Config(
            model=str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            device="cpu",
            num_kv_blocks=40,
            max_num_seqs=4,
            max_num_batched_tokens=32,
            decode_headroom_tokens=16,
            transfer_layer_group=2,
            lease_timeout_s=60,
            worker_timeout_s=5,
        )
    )
    await pair.start()
    yield pair
    await pair.stop()


PROMPT = [(7 * i) % 90 for i in range(70)]


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


async def test_cached_blocks_are_not_sent_again(pair: Pair) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for name in ("one", "two"):
        key = pair.lease(name, PROMPT, params)
        await pair.start_prefill(key, PROMPT, params)
        await pair.router.wait(lambda key=key: len(pair.router.tokens(key)) == 4)
    grants = [m for m in pair.router.messages if isinstance(m, LeaseGranted)]
    assert [g.num_cached_tokens for g in grants] == [0, 64]
    assert pair.router.tokens(LegKey("one", 0)) == pair.router.tokens(LegKey("two", 0))
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


async def test_lost_puts_are_aborted_and_quarantine_ends(pair: Pair) -> None:
    """A put that never arrives keeps the blocks in quarantine until the writer says that it stopped."""
    inner = pair.prefill._channels["decode-0"]

    def plan(n: int, put: Put) -> Fault | None:
        return Fault("fail") if n == 2 else Fault("delay", 0.05)

    pair.prefill._channels["decode-0"] = FaultInjectingChannel(inner, plan)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    key = pair.lease("faulty", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    failed = await pair.router.first(PrefillFailed, key)
    assert "injected" in failed.reason
    await pair.quiet()


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
    assert denied.retriable
    pair.router.sessions["decode-0"].send(CloseLease(*keys[0], "test"))
    await pair.router.wait(lambda: any(type(m).__name__ == "CreditUpdate" for m in pair.router.messages))
    too_long = pair.lease("too-long", [1] * 512, params)
    assert not (await pair.router.first(LeaseDenied, too_long)).retriable
    for key in keys[1:]:
        pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    await pair.quiet()


async def test_other_weights_are_refused(pair: Pair) -> None:
    with pytest.raises(HandshakeError, match="differ"):
        await pair.decode.accept(WorkerInfo("prefill-1", "x", "prefill", "", 0, 0, "", "cpu", "other", 1, 16, 64), 1)


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
