"""The channel of a pair of workers: how it opens, what it may fail at, and what ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from worker_pairs import PROMPT, SECRET, Pair, fake_device, finish, host_memory_kind, make_config, transport_of

from pdray.actors.prefill_worker import PrefillWorker
from pdray.errors import HandshakeError, TransferError
from pdray.sampling_params import SamplingParams
from pdray.testing.fault_injection import Fault, FaultInjectingSender
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import Kind, Put, Site
from pdray.transfer.registry import KINDS, load_kind
from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.lease_messages import CloseLease
from pdray.wire.prefill_messages import PrefillFailed


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


async def test_other_weights_are_refused(pair: Pair) -> None:
    with pytest.raises(HandshakeError, match="differ"):
        await pair.decode.accept(
            WorkerInfo("prefill-1", "x", "prefill", "", 0, 0, "", "cpu", "other", 1, 16, 64, 8, 64), 1
        )


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
    def wire_without_bytes() -> bytes:
        wire = fake_device.Wire()
        wire.faults = lambda number: False
        name = f"broken-{len(fake_device.HostTransport.wires)}".encode()
        fake_device.HostTransport.wires[name] = wire
        return name

    make = transport_of(pair.prefill).make_unique_id
    transport_of(pair.prefill).make_unique_id = wire_without_bytes
    with pytest.raises(TransferError, match="did not get on|gave up"):
        await pair.connect(2)
    assert (await pair.prefill.heartbeat()).epochs == {}
    transport_of(pair.prefill).make_unique_id = make
    await pair.connect(3)
    await finish(pair, "after", 3)
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
        "shared": "prefill-0 has memory of its own (on CPU it must be asked for)",
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
