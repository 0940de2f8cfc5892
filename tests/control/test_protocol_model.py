"""The control code against thousands of interleavings of death, stop, delay, loss, abort and reconnection.

The Coordinator dies too, and is started again without a memory.

PDRAY_MODEL_WALKS sets how many random walks are made (default: a thousand, some seconds).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec import structs

from pdray.control.credit import CreditWaiters
from pdray.control.effects import LedgerEffect, Release, Send, StopCompute
from pdray.control.lease import LeaseState
from pdray.control.lease_table import LeaseTable
from pdray.control.membership import Membership
from pdray.control.prefill_ledger import PrefillLedger
from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.lease_messages import Credit
from pdray.wire.message import LegKey
from pdray.wire.put_messages import PutAborted

for _name in ("protocol_processes", "protocol_workers", "protocol_cluster", "protocol_world"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None and _spec.loader is not None
    _module = sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
protocol_world = sys.modules["protocol_world"]

NUM_WALKS = int(os.environ.get("PDRAY_MODEL_WALKS", "1000"))
WALK_STEPS = 300
TOPOLOGIES = [
    {"num_prefill": 2, "num_decode": 2},
    {"num_prefill": 1, "num_decode": 1},
    {"num_prefill": 0, "num_decode": 2},
    {"num_prefill": 2, "num_decode": 1, "guests": True},
]

GUESTS = TOPOLOGIES[-1]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Routers log each loss, of which there are many thousands."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class ProtocolMachine(RuleBasedStateMachine):
    """Hypothesis chooses among whatever can happen next."""

    @initialize(topology=st.sampled_from(TOPOLOGIES))
    def start(self, topology: dict[str, int]) -> None:
        self.world = protocol_world.World(**topology)

    @rule(choice=st.integers(0, 2**16))
    def act(self, choice: int) -> None:
        actions = self.world.actions()
        actions[choice % len(actions)]()

    @invariant()
    def nothing_is_violated(self) -> None:
        if hasattr(self, "world"):
            assert self.world.violations() == []

    def teardown(self) -> None:
        if hasattr(self, "world"):
            assert self.world.settle(random.Random(0)) == []


# Not shrunk: that takes minutes, and what is printed can be replayed action by action as it is.
ProtocolMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=120, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
TestProtocol = ProtocolMachine.TestCase


def poisoned_in_decoding(**options: Any) -> tuple[Any, Any]:
    """A world with a request whose first step of decoding is next, and its router."""
    world = protocol_world.World(**options)
    process = world.routers[0]
    world.carry_on()
    world.submit(process, 1, poison=True)
    assert world.poison == {"request-0": False}
    world.carry_on()
    return world, process.router


def test_poison_gets_on_where_no_step_of_decoding_computes_it() -> None:
    """Its decode worker is lost after each first token: replays go on from there, and nobody decodes the last."""
    world, router = poisoned_in_decoding()
    for num_tokens in range(1, protocol_world.OUTPUT_TOKENS):
        (request,) = router.machine.requests.values()
        assert len(request.output.outputs[0].token_ids) == num_tokens
        (leg,) = request.legs.values()
        world.cut_router(world.routers[0], router.sessions[leg.choice.decode_worker_id])
        world.carry_on()
    assert router.outcomes == {"request-0": ["finished"]} and world.num_failures == 0
    assert world.settle(random.Random(0)) == []


def test_a_decoded_token_of_poison_is_a_violation() -> None:
    """Whoever decodes it without failing, tells."""
    world, _ = poisoned_in_decoding()
    (decode,) = (each for each in world.workers(protocol_world.DecodeProcess) if each.pool.running)
    poison, world.poison = world.poison, {}
    world.step(decode)
    world.poison = poison
    world.carry_on()
    assert world.violations() == ["('request-0', 0): token 1 of a step that fails: it is poison"]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=["2P2D", "1P1D", "colocated", "guests"])
def test_random_walks_violate_nothing(topology: dict[str, int]) -> None:
    for seed in range(NUM_WALKS // len(TOPOLOGIES)):
        assert protocol_world.walk(seed, WALK_STEPS, **topology) == [], f"seed {seed}"


def test_walks_reach_every_state_and_outcome() -> None:
    """The walks mean little if they never get anywhere: every lease state, replays and all outcomes are visited."""
    states: set[str] = set()
    ahead: set[tuple[str, bool]] = set()  # of legs that began before their lease: state, and whether tokens wait
    outcomes: set[str] = set()
    attempts = 0
    for seed in range(60):
        rng, world = random.Random(seed), protocol_world.World(**TOPOLOGIES[seed % 2])
        for _ in range(WALK_STEPS):
            rng.choice(world.actions())()
            for decode in world.workers(protocol_world.DecodeProcess):
                states |= {info.state for info in decode.table.leases(world.now)}
            for process in world.routers:
                legs = [leg for request in process.router.machine.requests.values() for leg in request.legs.values()]
                ahead |= {(str(leg.state), leg.first_tokens is not None) for leg in legs if leg.is_ahead}
        world.settle(rng)
        for process in world.routers:
            outcomes |= {outcome for each in process.router.outcomes.values() for outcome in each}
            attempts = max(attempts, process.router.num_attempts)
    assert states == {str(state) for state in LeaseState}
    assert {("asked", False), ("asked", True), ("filling", False), ("filling", True)} <= ahead
    assert outcomes == {"finished", "aborted", "rejected", "failed", "blamed"}
    assert attempts >= 3  # a second failure during recovery


class FreesFillingLeases(LeaseTable):
    """The bug of bugs: a timeout or a close frees what another process may still write."""

    def _end(self, key: LegKey, lease: Any) -> list[Send]:
        self._free(key)
        return []


class ExpiresQuarantine(LeaseTable):
    """A timeout alone frees: the stopped writer that wakes up finds another request in its target."""

    def expire(self, now: float) -> list[Send]:
        for key, lease in list(self._leases.items()):
            if lease.state is LeaseState.QUARANTINE and lease.expires <= now:
                self._free(key)
        return super().expire(now)


class AcknowledgesTooEarly(PrefillLedger):
    """PutAborted while a put is in flight."""

    def abort_put(self, decode_worker_id: str, key: LegKey) -> list[LedgerEffect]:
        return [Send(decode_worker_id, PutAborted(*key)), *super().abort_put(decode_worker_id, key)]


class NeverAcknowledges(PrefillLedger):
    """Quarantine never ends."""

    def _leave_if_idle(self, key: LegKey, leg: Any) -> list[LedgerEffect]:
        return [effect for effect in super()._leave_if_idle(key, leg) if isinstance(effect, Release)]


class ForgetsFailedKills(Membership):
    """A worker whose kill has failed once stays DYING for ever."""

    def kill_failed(self, now: float, incarnation: str, reason: str) -> None:
        return


class ForgetsFailedNews(Membership):
    """Who could not be told of a death once never hears of it: quarantine never ends."""

    def tell_failed(self, now: float, worker_id: str, incarnation: str, gone: WorkerInfo, reason: str) -> None:
        return


class StartsBesideStrays(Membership):
    """A process that was not seen dead does not keep another from its name, nor its writes from being forgotten."""

    def adopt(self, identities: Any, strays: Any = ()) -> None:
        super().adopt(identities, strays)
        self._strays.clear()


class TellsNobody(CreditWaiters):
    """Who waits for credit is never told that it has come back."""

    def announce(self, credit: Credit) -> list[Send]:
        super().announce(credit)
        return []


class KeepsWhatNobodyDecodes(PrefillLedger):
    """A leg without a decode worker waits for its word."""

    def _finish_if_pushed(self, now: float, key: LegKey, leg: Any) -> list[LedgerEffect]:
        return [] if leg.request.decode_worker_id is None else super()._finish_if_pushed(now, key, leg)


class ForgetsWhoIsAlone(LeaseTable):
    """A suspect is computed with others again, and nobody learns who is to blame."""

    def request(self, now: float, router_id: str, message: Any) -> list[Send]:
        return super().request(now, router_id, msgspec.structs.replace(message, alone=False))


class ForgetsThatLeasesStand(PrefillLedger):
    """A leg that was begun before its lease was granted never asks whether it may write."""

    def lease_confirmed(self, key: LegKey, num_cached_tokens: int) -> list[LedgerEffect]:
        return []


class AwaitsAnAnswerToNoQuestion(PrefillLedger):
    """A leg that ends before its lease is granted stays, as if its decode worker had been asked."""

    def _leave_if_idle(self, key: LegKey, leg: Any) -> list[LedgerEffect]:
        return [] if leg.stopping and leg.may_put is None else super()._leave_if_idle(key, leg)


class SaysStoppedInAStep(PrefillLedger):
    """A guest acknowledges an abort while a step in flight still computes the leg."""

    def _stop(self, key: LegKey, leg: Any) -> list[LedgerEffect]:
        was_writing, leg.is_writing = leg.is_writing, False
        return [*([StopCompute(key)] if was_writing else []), *super()._stop(key, leg)]

    def stopped(self, key: LegKey) -> list[LedgerEffect]:
        return []


class GuestsOutliveTheirLender(Membership):
    """A guest holds the memory of a dead process, and its lender's successor has none."""

    def _has_own_memory(self, guest: str) -> bool:
        return True


class StartsLendersBesideGuests(Membership):
    """The successor does not wait until they have ended."""

    def _may_start(self, worker_id: str, names_taken: set[str]) -> bool:
        return worker_id not in self.guests or super()._may_start(worker_id, names_taken)


class StartsGuestsFirst(Membership):
    def _may_start(self, worker_id: str, names_taken: set[str]) -> bool:
        return worker_id in self.guests or super()._may_start(worker_id, names_taken)


class KeepsGuestsOfTheDead(Membership):
    """A Coordinator that was started again goes on with a guest whose lender has ended meanwhile."""

    def adopt(self, identities: Any, strays: Any = ()) -> None:
        own = [structs.replace(each, info=structs.replace(each.info, lender="")) for each in identities]
        super().adopt(own, strays)


def blames_everybody(suspects: list[LegKey]) -> str:
    """Whoever was in the step fails at once."""
    return "failed"


def blames_nobody(suspects: list[LegKey]) -> str:
    """The guilty one is replayed for ever."""
    return "suspect"


@pytest.mark.parametrize(
    "mutant",
    [
        {"table": ForgetsWhoIsAlone, "num_prefill": 0, "num_decode": 1},
        {"blame": blames_everybody},
        {"blame": blames_nobody},
        {"table": FreesFillingLeases},
        {"table": ExpiresQuarantine},
        {"ledger": AcknowledgesTooEarly},
        {"ledger": NeverAcknowledges},
        {"members": ForgetsFailedKills},
        {"members": ForgetsFailedNews},
        {"members": StartsBesideStrays},
        {"ledger": KeepsWhatNobodyDecodes},
        {"ledger": ForgetsThatLeasesStand},
        {"ledger": AwaitsAnAnswerToNoQuestion},
        {"waiters": TellsNobody},
        {"ledger": SaysStoppedInAStep} | GUESTS,
        {"members": GuestsOutliveTheirLender} | GUESTS,
        {"members": StartsLendersBesideGuests} | GUESTS,
        {"members": StartsGuestsFirst} | GUESTS,
        {"members": KeepsGuestsOfTheDead} | GUESTS,
    ],
    ids=lambda mutant: next(iter(mutant.values())).__name__,
)
def test_the_check_has_teeth(mutant: dict[str, Any]) -> None:
    """Each seeded bug is found within some hundred walks."""

    def finds(seed: int) -> bool:
        try:
            return bool(protocol_world.walk(seed, WALK_STEPS, **mutant))
        except (AssertionError, KeyError):
            return True

    assert any(finds(seed) for seed in range(600))
