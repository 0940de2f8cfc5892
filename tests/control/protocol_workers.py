"""Simulated workers: every decision about a lease or a put is taken by the code under test.

Puts write straight into the decode worker's blocks when they complete, with no check by the receiver: the harshest
channel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from protocol_processes import (
    BLOCKS_PER_LEG,
    LAYER_GROUPS,
    OUTPUT_TOKENS,
    DecodeProcess,
    PrefillProcess,
    Process,
    PutInFlight,
    RouterProcess,
    credit,
    sampled,
)

from pdray.control.effects import FlushPuts, Release, Send, StartCompute, StopCompute
from pdray.engine.request import Reservation
from pdray.testing.simulated_router import Held
from pdray.wire.lease_messages import CloseLease, EndCompletion, LeaseRequest, LegTokens, RenewLeases, Tokens
from pdray.wire.message import LegKey, Verdict
from pdray.wire.prefill_messages import CancelPrefill, FirstTokens, LeaseConfirmed, Ping, Pong, PrefillRequest
from pdray.wire.put_messages import AbortPut, BeginPut, BeginPutReply, PutAborted, PutDone
from pdray.wire.worker_news import StepFailed


class Workers:
    """Workers around the real leases and prefill ledgers: the messages that they get, and what they compute."""

    def __init__(self, blame: Callable[[list[LegKey]], Verdict]) -> None:
        self.now = 0.0
        self._blame = blame
        self.poison: dict[str, bool] = {}  # whether it breaks prefill workers, too
        self.prefilled: set[tuple[str, int, int]] = set()  # tokens that these have sampled
        self.num_failures = 0
        self.processes: dict[str, Process] = {}
        self.routers: list[RouterProcess] = []
        self.links: dict[tuple[Process, Process], deque[Any]] = {}
        self.problems: list[str] = []

    def workers(self, kind: type[Any]) -> list[Any]:
        return [process for process in self.processes.values() if isinstance(process, kind)]

    # messages

    def _send(self, source: Process, effects: list[Send]) -> None:
        for effect in effects:
            destination = self.processes.get(effect.to)
            if destination is not None and destination.alive and source.alive:
                if isinstance(source, DecodeProcess) and isinstance(destination, PrefillProcess):
                    entry = destination.epochs.get(source.name)
                    if entry is None or entry[1] is not source:
                        continue  # no session: dropped, and asked again when there is one
                if isinstance(destination, RouterProcess):
                    held = destination.router.sessions.get(source.name)
                    if held is None or held.incarnation != source.incarnation:
                        continue
                self.links.setdefault((source, destination), deque()).append(effect.message)

    def deliver(self, ends: tuple[Process, Process]) -> None:
        source, destination = ends
        message = self.links[ends].popleft()
        if not self.links[ends]:
            del self.links[ends]
        if isinstance(destination, DecodeProcess):
            self._decode_receives(destination, source, message)
        elif isinstance(destination, PrefillProcess):
            self._prefill_receives(destination, source, message)
        elif isinstance(destination, RouterProcess):
            destination.router.receive(self.now, Held(source.name, source.incarnation), message)

    def _decode_receives(self, decode: DecodeProcess, source: Process, message: Any) -> None:
        table = decode.table
        match message:
            case LeaseRequest():
                self._decode_do(decode, table.request(self.now, source.name, message))
            case RenewLeases():
                table.renew(self.now, source.name, message.keys)
                answer = decode.waiters.renewed(source.name, message.wanted, credit(decode.pool))
                if not message.keys:  # or heartbeats would hide that somebody was forgotten
                    self._send(decode, [answer])
            case CloseLease():
                self._decode_do(decode, table.close(message.key))
            case EndCompletion():
                self._end_completion(decode, message.key, message.index)
            case BeginPut():
                # A channel may resolve positions now and write much later: what it writes to is what it was told here.
                self._send(decode, table.begin_put(source.name, message))
                places = table.resolve(message.key, source.name, message.epoch, range(BLOCKS_PER_LEG))
                if places is not None:
                    decode.targets[message.key] = places
            case PutDone():
                self._decode_do(decode, table.put_done(self.now, source.name, message))
            case PutAborted():
                self._decode_do(decode, table.put_aborted(source.name, message.key))

    def _decode_do(self, decode: DecodeProcess, effects: list[Send]) -> None:
        """As the worker does it: whoever waits hears of the credit that has come back."""
        self._send(decode, [*effects, *decode.waiters.announce(credit(decode.pool))])

    def _prefill_receives(self, prefill: PrefillProcess, source: Process, message: Any) -> None:
        ledger = prefill.ledger
        match message:
            case PrefillRequest():
                entry = prefill.epochs.get(message.decode_worker_id)
                self._ledger_do(prefill, ledger.request(source.name, message, None if entry is None else entry[0]))
            case Ping():
                self._send(prefill, [Send(source.name, Pong(len(prefill.computing)))])
            case LeaseConfirmed():
                self._ledger_do(prefill, ledger.lease_confirmed(message.key, message.num_cached_tokens))
            case CancelPrefill():
                self._ledger_do(prefill, ledger.cancel(message.key))
            case BeginPutReply():
                given = Reservation(message.block_ids, message.num_cached_tokens)
                self._ledger_do(prefill, ledger.begin_put_reply(message.key, message.granted, given))
            case AbortPut():
                self._ledger_do(prefill, ledger.abort_put(source.name, message.key))

    def _ledger_do(self, prefill: PrefillProcess, effects: list[Any]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(prefill, [effect])
                case StartCompute(key):
                    prefill.computing[key] = LAYER_GROUPS
                    if prefill.lender is not None:
                        given = prefill.ledger.given(key)
                        assert given is not None
                        prefill.writes[key] = given.block_ids
                case FlushPuts(key):
                    for _ in range(prefill.held.pop(key, 0)):
                        self._put(prefill, key)
                    self._ledger_do(prefill, prefill.ledger.puts_flushed(self.now, key))
                case StopCompute(key):
                    prefill.computing.pop(key, None)
                    prefill.leaving.add(key)
                case Release(key):
                    prefill.computing.pop(key, None)
                    prefill.held.pop(key, None)
                    if any(put.key == key for put in prefill.puts):
                        self.problems.append(f"{key}: source blocks unpinned with a put in flight")

    # engines and channels

    def _put(self, prefill: PrefillProcess, key: LegKey) -> None:
        leg = prefill.ledger.leg(key)
        assert leg is not None and leg.decode_worker_id is not None
        prefill.ledger.put_issued(key)
        decode = prefill.epochs[leg.decode_worker_id][1]
        prefill.puts.append(PutInFlight(key, decode, decode.targets[key]))

    def compute(self, prefill: PrefillProcess, key: LegKey) -> None:
        """One layer group of one leg, and the first token after the last."""
        leg = prefill.ledger.leg(key)
        if leg is None:
            del prefill.computing[key]
            return
        if self.poison.get(key.request_id):
            self._engine_fails(prefill, [key] if leg.alone else self._shared_step(prefill))
            return
        if prefill.lender is None and prefill.ledger.may_put(key):
            self._put(prefill, key)
        elif prefill.ledger.may_hold(key):
            prefill.held[key] = prefill.held.get(key, 0) + 1
        prefill.computing[key] -= 1
        if prefill.computing[key] == 0:
            del prefill.computing[key]
            prefill.writes.pop(key, None)
            position = len(leg.output_token_ids)
            tokens = [sampled(leg.request_id, index, position) for index in leg.indices]
            self.prefilled |= {(leg.request_id, index, position) for index in leg.indices}
            self._ledger_do(prefill, prefill.ledger.computed(self.now, FirstTokens(*key, tokens, 0, 0.0, 0.0)))

    def end_step(self, prefill: PrefillProcess, key: LegKey) -> None:
        """The last step of a guest's that computed a leg which was given up is over."""
        prefill.leaving.remove(key)
        del prefill.writes[key]
        self._ledger_do(prefill, prefill.ledger.stopped(key))

    def check_guest(self, guest: PrefillProcess) -> None:
        """What a guest computes lies in its own legs' blocks."""
        if guest.lender is not None and guest.lender.alive:
            for key, blocks in guest.writes.items():
                self._check_target(key, guest.lender, blocks)

    def finish_put(self, prefill: PrefillProcess, put: PutInFlight) -> None:
        """The bytes land: in whatever the blocks belong to by now."""
        self._finish_put(prefill, put, error=None)

    def _finish_put(self, prefill: PrefillProcess, put: PutInFlight, error: str | None) -> None:
        prefill.puts.remove(put)
        if put.decode.alive:
            self._check_target(put.key, put.decode, put.blocks)
            entry = prefill.epochs.get(put.decode.name)
            if error is None and entry is not None and put.decode.table.may_write(put.key, prefill.name, entry[0]):
                self._decode_do(put.decode, put.decode.table.put_received(self.now, put.key))
        self._ledger_do(prefill, prefill.ledger.put_completed(put.key, error))

    def _check_target(self, key: LegKey, decode: DecodeProcess, blocks: list[int]) -> None:
        for block in blocks:
            if decode.pool.owner.get(block) != key:
                self.problems.append(f"{key} may write block {block}, which belongs to {decode.pool.owner.get(block)}")

    @staticmethod
    def _shared_step(prefill: PrefillProcess) -> list[LegKey]:
        """Legs that are computed together."""
        legs = {key: prefill.ledger.leg(key) for key in prefill.computing}
        return [key for key, leg in legs.items() if leg is not None and not leg.alone]

    def _engine_fails(self, worker: DecodeProcess | PrefillProcess, step: list[LegKey]) -> None:
        """Every other time it survives, and only the legs of the step end."""
        self.num_failures += 1
        if self.num_failures % 2:
            worker.broken = True
            for router in self.routers:
                self._send(worker, [Send(router.name, StepFailed("broken", step))])
            return
        for key in step:
            if isinstance(worker, DecodeProcess):
                worker.pool.release(key)
                self._send(worker, worker.table.failed(key, "broken", self._blame(step)))
            else:
                worker.computing.pop(key, None)
                self._ledger_do(worker, worker.ledger.fail(key, "broken", self._blame(step)))

    def step(self, decode: DecodeProcess) -> None:
        """One decode step: a token for every completion that it computes."""
        by_router: dict[str, list[LegTokens]] = {}
        plan = decode.pool.plan()
        if any(key.request_id in self.poison for key in plan):
            self._engine_fails(decode, plan)
            return
        for key in plan:
            positions = decode.pool.running[key]
            tokens = [sampled(key.request_id, index, position) for index, position in positions.items()]
            decode.pool.running[key] = {
                index: position + 1 for index, position in positions.items() if position + 1 < OUTPUT_TOKENS
            }
            router_id = decode.table.router_of(key)
            if router_id is None:
                self.problems.append(f"{key} runs without a lease")
                continue
            by_router.setdefault(router_id, []).append(LegTokens(*key, tokens))
            self._finish_if_done(decode, key)
        now = credit(decode.pool)
        self._decode_do(decode, [Send(router_id, Tokens(legs, now)) for router_id, legs in by_router.items()])

    def _end_completion(self, decode: DecodeProcess, key: LegKey, index: int) -> None:
        """A stop string, which only the router sees."""
        if key in decode.pool.running:
            decode.pool.running[key].pop(index, None)
            self._finish_if_done(decode, key)

    def _finish_if_done(self, decode: DecodeProcess, key: LegKey) -> None:
        if not decode.pool.running[key]:
            decode.pool.release(key)
            self._decode_do(decode, decode.table.finished(key))
