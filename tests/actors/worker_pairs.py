"""PrefillWorker and DecodeWorker in one process, without Ray, driven by a scripted router over real sessions."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.prefill_worker import PrefillWorker
from pdray.actors.worker import Worker
from pdray.config import Config
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import Site
from pdray.transfer.cuda_ipc.kind import CudaIpcKind
from pdray.transfer.nccl.kind import NcclKind
from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.dial import connect
from pdray.wire.lease_messages import LeaseGranted, LeaseRequest, Tokens
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName, Role
from pdray.wire.prefill_messages import FirstTokens, LeaseConfirmed, PrefillRequest
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
        decode = await self.decode.start()
        self.prefill.lender = decode if self.config.channel == "shared" else None
        prefill = await self.prefill.start()
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


PROMPT = [(7 * i) % 90 for i in range(70)]


async def finish(pair: Pair, name: str, epoch: int) -> list[int]:
    """A leg over the pair's channel of that epoch, to its end."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    key = pair.lease(name, PROMPT, params)
    await pair.start_prefill(key, PROMPT, params, epoch=epoch)
    await pair.router.wait(lambda: len(pair.router.tokens(key)) == 6)
    return pair.router.tokens(key)
