"""One lease on a decode worker, and what its table needs of others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from pdray.engine.request import EngineRequest, Reservation
from pdray.outputs import SampledToken
from pdray.wire.lease_messages import LeaseRequest
from pdray.wire.message import LegKey
from pdray.wire.put_messages import PutDone


class LeaseState(StrEnum):
    """See lease_table.py's picture. Closed leases are not kept."""

    GRANTED = "granted"
    FILLING = "filling"
    RUNNING = "running"
    QUARANTINE = "quarantine"


class Allocator(Protocol):
    """The part of an engine that the table needs."""

    def reserve(self, request: EngineRequest) -> Reservation | None: ...
    def start_prefill(self, key: LegKey) -> None: ...
    def start_decode(self, key: LegKey, tokens: list[SampledToken]) -> None: ...
    def lend(self, key: LegKey) -> Reservation: ...
    def release(self, key: LegKey) -> None: ...


class Writer(NamedTuple):
    """A prefill worker process as this decode worker knows it."""

    incarnation: str
    epoch: int
    is_guest: bool = False  # computes in this worker's pool


class LeaseInfo(NamedTuple):
    """One lease, for `pdray status`."""

    request_id: str
    attempt: int
    state: str
    router_id: str
    prefill_worker_id: str | None
    num_blocks: int
    expires_in_s: float


@dataclass(slots=True)
class Lease:
    """One leg's entry in the table."""

    router_id: str
    request: LeaseRequest
    reservation: Reservation
    state: LeaseState
    expires: float
    writer: Writer | None = None  # who was let in by begin_put
    puts_received: int = 0
    put_done: PutDone | None = None
    put_done_at: float = 0.0
    transfer_wait: float | None = None


def engine_request(message: LeaseRequest) -> EngineRequest:
    """What the engine is asked to hold blocks for."""
    return EngineRequest(
        key=message.key,
        prompt_token_ids=message.prompt_token_ids,
        params=message.params,
        indices=tuple(message.indices),
        output_token_ids=tuple(message.output_token_ids),
        priority=message.priority,
        alone=message.alone,
        whole=message.whole,
    )
