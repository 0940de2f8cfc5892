"""PrefillWorker and DecodeWorker in one process, without Ray, driven by a scripted router over real sessions."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.prefill_worker import PrefillWorker
from pdray.actors.worker import Worker
from pdray.config import Config
from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.request import LayerGroupReady, RequestUpdate
from pdray.errors import EngineHungError, HandshakeError, TransferError
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.fault_injection import Fault, FaultInjectingSender
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import Kind, Put, Site
from pdray.transfer.cuda_ipc.kind import CudaIpcKind
from pdray.transfer.nccl.kind import NcclKind
from pdray.transfer.registry import KINDS, load_kind
from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.dial import connect
from pdray.wire.lease_messages import (
    CloseLease,
    CreditUpdate,
    CreditWanted,
    EndCompletion,
    LeaseClosed,
    LeaseDenied,
    LeaseGranted,
    LeaseRequest,
    RenewLeases,
    Tokens,
)
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName, Role
from pdray.wire.prefill_messages import CancelPrefill, FirstTokens, LeaseConfirmed, PrefillFailed, PrefillRequest
from pdray.wire.session import Session


def load(name: str) -> Any:
    """A helper of tests/transfer, under its own name."""
    path = Path(__file__).parents[1] / "transfer" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake_device, toy_kind = load("fake_device"), load("toy_kind")

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
        self.receive_array = self

    def remote(self, *args: Any) -> Any:
        class Call:
            @staticmethod
            def future() -> Any:
                return asyncio.run_coroutine_threadsafe(self.worker.receive_array(*args), self.loop)

        return Call()


def host_kind(site: Site) -> NcclKind:
    """The nccl channel over a fake device."""
    return NcclKind(site, fake_device.HostTransport(gpu=site.worker_id))


def host_memory_kind(site: Site) -> CudaIpcKind:
    """The cuda_ipc channel over memory of this process."""
    return CudaIpcKind(site, fake_device.HostMemory(gpu=site.worker_id))


def transport_of(worker: Worker) -> Any:
    return worker.kinds["nccl"]._transport  # type: ignore[attr-defined]


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
            me=PeerName("router-test", "1", Role.ROUTER),
            expect=PeerName(info.worker_id, info.incarnation, info.role),
            secret=SECRET,
            handler=self,
            timeout_s=5,
        )

    async def wait(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(PATIENCE_S):
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
        self.config = config
        self.prefill = PrefillWorker(config, "prefill-0", "p1", SECRET)
        self.decode = DecodeWorker(config, "decode-0", "d1", SECRET)
        self.router = ScriptedRouter()

    async def start(self) -> None:
        prefill, decode = await self.prefill.start(), await self.decode.start()
        await self.connect(1)
        await self.router.open(prefill)
        await self.router.open(decode)

    async def connect(self, epoch: int) -> None:
        """As the Coordinator does."""
        offer = await self.decode.accept(self.prefill.info, epoch)
        await self.prefill.connect(self.decode.info, epoch, offer, LocalActor(self.decode))

    async def stop(self) -> None:
        await self.prefill.stop()
        await self.decode.stop()

    def lease(self, name: str, prompt: list[int], params: SamplingParams, **kwargs: Any) -> LegKey:
        message = LeaseRequest(
            name, 0, prompt, params, list(range(params.n)), [], **{"prefill_worker_id": "prefill-0"} | kwargs
        )
        self.router.sessions["decode-0"].send(message)
        return message.key

    async def start_prefill(
        self, key: LegKey, prompt: list[int], params: SamplingParams, epoch: int = 1, *, ahead: bool = False
    ) -> None:
        """ahead: first to compute, and once that is done, that the lease stands."""
        if ahead:
            parts = prompt, params, list(range(params.n)), [], "decode-0", epoch, 0
            self.router.sessions["prefill-0"].send(PrefillRequest(*key, *parts, has_lease=False))
            await self.router.first(FirstTokens, key)
        grant = await self.router.first(LeaseGranted, key)
        if ahead:
            self.router.sessions["prefill-0"].send(LeaseConfirmed(*key, grant.num_cached_tokens))
            return
        self.router.sessions["prefill-0"].send(
            PrefillRequest(
                *key,
                prompt,
                params,
                list(range(params.n)),
                [],
                "decode-0",
                epoch,
                grant.num_cached_tokens,
            )
        )

    async def quiet(self) -> None:
        """Returns once both workers hold nothing; fails if that does not come."""
        async with asyncio.timeout(PATIENCE_S):
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


@pytest.fixture(params=["object_store", "nccl", "cuda_ipc", "toy"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """Two workers over the real object store's half, over the nccl or cuda_ipc channel with a fake device under it, or
    over a channel kind that only this fixture knows."""
    if request.param == "toy":
        monkeypatch.setattr("pdray.transfer.registry.KINDS", {"toy": "toy_kind:ToyKind"})
    if request.param == "nccl":
        monkeypatch.setattr("pdray.actors.assembly.load_kind", lambda name: host_kind)
    if request.param == "cuda_ipc":
        monkeypatch.setattr("pdray.actors.assembly.load_kind", lambda name: host_memory_kind)
    pair = Pair(make_config(tmp_path, "auto" if request.param == "toy" else request.param))
    await pair.start()
    yield pair
    await pair.stop()


def make_config(tmp_path: Path, channel: str) -> Config:
    """Of a tiny model; its prompts go in several groups of layers."""
    model = tmp_path / "config.json"
    model.write_text(json.dumps(TINY))
    return Config(
        channel=channel,
        transfer_staging_bytes=160_000,
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


async def test_the_log_tells_once_what_a_worker_serves_with_what(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    worker = DecodeWorker(pair.decode.config, "decode-1", "i", SECRET, app_name="shop")
    with caplog.at_level("INFO", "pdray.actors.assembly"):
        await worker.start()
    await worker.stop()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "pdray.actors.assembly"]
    model = pair.decode.config.model
    for part in ("DecodeWorker(shop:decode-1)", f"model {model} (float32) on cpu", "40 blocks of 16", "max_num_seqs=4"):
        assert part in line


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


def give_vocabulary(pair: Pair) -> None:
    """Token i is the byte i + 32; the last one, the end of sequence, is no text."""
    tokens = TokenPieces([bytes([32 + i]) for i in range(95)] + [b""], frozenset({95}))
    for worker in (pair.prefill, pair.decode):
        worker.engine.grammars = GrammarCompiler(lambda: tokens)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_grammar_holds_from_the_first_token_on(pair: Pair, n: int) -> None:
    """The prefill worker draws under it, and the decode worker goes on from there, to its end."""
    give_vocabulary(pair)
    wanted = StructuredOutputsParams(regex="[a-f]{3}[0-9]{4}")
    params = SamplingParams(n=n, temperature=1.0, seed=3, max_tokens=30, structured_outputs=wanted)
    texts = {}
    for name, prefill_worker_id in (("apart", "prefill-0"), ("local", None)):
        key = pair.lease(name, PROMPT, params, prefill_worker_id=prefill_worker_id)
        if prefill_worker_id is not None:
            await pair.start_prefill(key, PROMPT, params)
        await pair.router.wait(lambda key=key: all(len(pair.router.tokens(key, i)) == 7 for i in range(n)))
        texts[name] = [bytes(32 + token for token in pair.router.tokens(key, i)).decode() for i in range(n)]
    assert all(re.fullmatch("[a-f]{3}[0-9]{4}", text) for text in texts["apart"])
    assert texts["apart"] == texts["local"]
    await pair.quiet()


async def test_a_grammar_that_a_worker_cannot_compile_ends_the_leg_alone(pair: Pair) -> None:
    """Routers check before; here the prefill worker says so, and the lease is closed."""
    give_vocabulary(pair)
    wanted = StructuredOutputsParams(regex="(?=a)b")
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=30, structured_outputs=wanted)
    key = pair.lease("r", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    failed = await pair.router.first(PrefillFailed, key)
    assert (failed.verdict, failed.param) == ("invalid", "structured_outputs") and "look-around" in failed.reason
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    local = pair.lease("local", PROMPT, params, prefill_worker_id=None)
    closed = await pair.router.first(LeaseClosed, local)
    assert closed.verdict == "invalid" and "look-around" in closed.reason
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


async def test_lost_puts_are_aborted_and_quarantine_ends(pair: Pair) -> None:
    """A put that never arrives keeps the blocks in quarantine until the writer says that it stopped."""
    inner = pair.prefill._channels["decode-0"]

    def plan(n: int, put: Put) -> Fault | None:
        return Fault("fail") if n == 2 else Fault("delay", 0.05)

    pair.prefill._channels["decode-0"] = FaultInjectingSender(inner, plan)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    key = pair.lease("faulty", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    failed = await pair.router.first(PrefillFailed, key)
    assert "injected" in failed.reason
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


async def test_other_weights_are_refused(pair: Pair) -> None:
    with pytest.raises(HandshakeError, match="differ"):
        await pair.decode.accept(
            WorkerInfo("prefill-1", "x", "prefill", "", 0, 0, "", "cpu", "other", 1, 16, 64, 8, 64), 1
        )


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


async def finish(pair: Pair, name: str, epoch: int) -> list[int]:
    """A leg over the pair's channel of that epoch, to its end."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    key = pair.lease(name, PROMPT, params)
    await pair.start_prefill(key, PROMPT, params, epoch=epoch)
    await pair.router.wait(lambda: len(pair.router.tokens(key)) == 6)
    return pair.router.tokens(key)


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


@pytest.mark.parametrize("pair", ["nccl"], indirect=True)
async def test_a_channel_that_hangs_is_given_up_and_connected_again(pair: Pair) -> None:
    """The bytes of a put never come: its leg fails, the workers go on, and the next epoch works."""
    expected = await finish(pair, "before", 1)
    transport_of(pair.prefill).communicators[0].wire.faults = lambda number: False
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    other = [token + 1 for token in PROMPT]
    key = pair.lease("lost", other, params)
    await pair.start_prefill(key, other, params)
    failed = await pair.router.first(PrefillFailed, key)
    assert "channel" in failed.reason
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    async with asyncio.timeout(PATIENCE_S):
        while (await pair.prefill.heartbeat()).epochs.get("decode-0") is not None:
            await asyncio.sleep(0.02)
    await pair.connect(2)
    assert (await pair.prefill.heartbeat()).epochs == {"decode-0": 2}
    assert await finish(pair, "after", 2) == expected
    await pair.quiet()
    assert transport_of(pair.decode).most_at_once == 1


@pytest.mark.parametrize("pair", ["nccl"], indirect=True)
async def test_a_dead_prefill_worker_leaves_no_blocks_and_its_successor_connects(pair: Pair) -> None:
    transport_of(pair.prefill).communicators[0].wire.faults = lambda number: False
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    key = pair.lease("lost", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    await pair.router.wait(lambda: pair.prefill.ledger.leg(key) is not None)
    await pair.prefill.stop()
    await pair.decode.worker_gone("prefill-0", "p1")
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    pair.prefill = PrefillWorker(pair.config, "prefill-0", "p2", SECRET)
    await pair.prefill.start()
    await pair.connect(2)
    await pair.router.open(pair.prefill.info)
    await finish(pair, "after", 2)
    await pair.quiet()


@pytest.mark.parametrize("pair", ["nccl"], indirect=True)
async def test_a_probe_that_does_not_arrive_is_no_connection(pair: Pair) -> None:
    def wire_without_bytes() -> Any:
        wire = fake_device.Wire()
        wire.faults = lambda number: False
        name = f"broken-{len(fake_device.HostTransport.wires)}"
        fake_device.HostTransport.wires[name] = wire
        return name

    make = transport_of(pair.decode).make_unique_id
    transport_of(pair.decode).make_unique_id = wire_without_bytes
    with pytest.raises(TransferError, match="did not get on|gave up"):
        await pair.connect(2)
    assert (await pair.prefill.heartbeat()).epochs == {}
    transport_of(pair.decode).make_unique_id = make
    await pair.connect(3)
    await finish(pair, "after", 3)
    await pair.quiet()


def hold_writes(pair: Pair) -> tuple[threading.Event, threading.Event]:
    """The prefill worker's writes wait for the first event; the second says that one does."""
    gate, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)

    pair.prefill.kinds["cuda_ipc"]._transport.streams[-1].before_work = hold  # type: ignore[attr-defined]
    return gate, entered


async def held(pair: Pair) -> int:
    """Blocks of the decode worker that somebody may use or write."""
    stats = pair.decode.engine.stats()
    return stats.num_blocks - 1 - stats.free_blocks


@pytest.mark.parametrize("pair", ["cuda_ipc"], indirect=True)
async def test_blocks_that_are_being_written_are_nobody_elses(pair: Pair) -> None:
    """Neither a closed lease nor a lost session, nor time, frees them: only the writer's word."""
    expected = await finish(pair, "before", 1)
    other = [token + 1 for token in PROMPT]
    gate, entered = hold_writes(pair)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    key = pair.lease("lost", other, params)
    await pair.start_prefill(key, other, params)
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    closing = pair.prefill.disconnect("decode-0")
    pair.prefill._on_layer_group(LayerGroupReady(key, range(0, 1), 0, [1], None))  # computed since, and put nowhere
    closed = asyncio.ensure_future(closing)
    await asyncio.sleep(0.1)
    assert await held(pair) == 5 and not closed.done()
    connecting = asyncio.ensure_future(pair.connect(2))
    await asyncio.sleep(0.1)
    assert await held(pair) == 5 and not connecting.done(), "the old channel ends first"
    gate.set()
    await connecting
    await pair.quiet()
    assert await finish(pair, "after", 2) == expected
    await pair.quiet()


@pytest.mark.parametrize("pair", ["cuda_ipc"], indirect=True)
async def test_a_writer_that_is_seen_dead_holds_no_blocks(pair: Pair) -> None:
    gate, entered = hold_writes(pair)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    key = pair.lease("lost", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    stopping = asyncio.ensure_future(pair.prefill.stop())
    await asyncio.sleep(0.1)
    assert await held(pair) == 5
    gate.set()  # a process that is gone writes nothing any more
    await stopping
    await pair.decode.worker_gone("prefill-0", "p1")
    assert await held(pair) == 0
    pair.prefill = PrefillWorker(pair.config, "prefill-0", "p2", SECRET)
    await pair.prefill.start()
    await pair.connect(2)
    await pair.router.open(pair.prefill.info)
    await finish(pair, "after", 2)
    await pair.quiet()


async def test_a_kind_that_turns_out_not_to_work_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto: one connection fails, the next one has another kind; status says which, and why."""
    makers: dict[str, Callable[[Site], Kind]] = {name: load_kind(name) for name in KINDS}
    monkeypatch.setattr("pdray.actors.assembly.load_kind", lambda name: (makers | {"cuda_ipc": host_memory_kind})[name])
    pair = Pair(make_config(tmp_path, "auto"))
    await pair.prefill.start()
    await pair.decode.start()
    pair.prefill.kinds["cuda_ipc"]._transport.refuses = "no peer access"  # type: ignore[attr-defined]
    with pytest.raises(TransferError, match="cannot be mapped"):
        await pair.connect(1)
    await pair.connect(2)
    state = await pair.prefill.describe()
    assert state["channels"] == {"decode-0": "object_store"}
    assert state["passed_over"]["decode-0"] == {
        "cuda_ipc": "RuntimeError: no peer access",
        "nccl": "prefill-0 runs on cpu",
    }
    await pair.router.open(pair.prefill.info)
    await pair.router.open(pair.decode.info)
    await finish(pair, "works", 2)
    await pair.quiet()
    pair.prefill.kinds["cuda_ipc"]._transport.refuses = None  # type: ignore[attr-defined]
    await pair.connect(3)
    assert (await pair.prefill.describe())["channels"] == {"decode-0": "object_store"}, "of this process it is known"
    await pair.stop()


FORGERIES: dict[str, Callable[[Put], Put]] = {
    "after the end": lambda put: put._replace(first_position=5),
    "before the start": lambda put: put._replace(first_position=-1),
    "too many": lambda put: put._replace(source_blocks=put.source_blocks * 2),
    "cached blocks": lambda put: put._replace(first_position=0),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_put_cannot_name_what_its_lease_does_not_hold(
    pair: Pair, forgery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, the lease ends, and both workers go on."""
    expected = await finish(pair, "honest", 1)  # 64 of its 70 tokens are cached from now on
    channel = pair.prefill._channels["decode-0"]
    before, put = pair.decode.engine.pool.tensor.clone(), channel.put
    key = pair.lease("forged", PROMPT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    monkeypatch.setattr(channel, "put", lambda each: put(FORGERIES[forgery](each)))
    await pair.start_prefill(key, PROMPT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    closed = await pair.router.first(LeaseClosed, key)
    assert "which the lease does not hold" in closed.reason
    monkeypatch.undo()
    await pair.quiet()
    assert torch.equal(pair.decode.engine.pool.tensor[:, 1:], before[:, 1:])
    assert await finish(pair, "after", 1) == expected
    await pair.quiet()


@pytest.mark.parametrize("layers", [range(4, 6), range(-1, 1), range(2, 2), range(3, 1)], ids=str)
async def test_a_put_cannot_name_layers_that_are_not_there(
    pair: Pair, layers: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = pair.prefill._channels["decode-0"]
    put, resolved = channel.put, []

    def put_and_ask(each: Put) -> Any:
        resolved.append(pair.decode.resolve(each.key, "prefill-0", 1, layers, each.positions))
        return put(each)

    monkeypatch.setattr(channel, "put", put_and_ask)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    key = pair.lease("forged", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    closed = await pair.router.first(LeaseClosed, key)
    assert f"layers {layers.start} to {layers.stop}, which the lease does not hold" in closed.reason
    assert resolved[0] is None
    await pair.quiet()
