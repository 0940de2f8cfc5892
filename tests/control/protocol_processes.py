"""The processes of the simulated cluster, the engine's pool in them, and how much of everything there is."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from pdray.config import Config
from pdray.control.credit import CreditWaiters
from pdray.control.lease_table import LeaseTable
from pdray.control.prefill_ledger import PrefillLedger
from pdray.engine.request import EngineRequest, Reservation
from pdray.outputs import SampledToken
from pdray.testing.simulated_router import SimulatedRouter
from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.lease_messages import Credit
from pdray.wire.message import LegKey

LEASE_TIMEOUT_S = 10.0
BLOCK_SIZE = 16
NUM_BLOCKS = (12, 4)  # by walk: much at once, and routers that wait for each other's credit
BLOCKS_PER_LEG = 2
OUTPUT_TOKENS = 4
LAYER_GROUPS = 3
ALONE_STEPS = 2
MAX_QUEUE_SIZE = 4
DRAIN_S = 3.0


def token(request_id: str, index: int, position: int) -> int:
    """What every worker samples there: replays must agree."""
    return hash((request_id, index, position)) % 1000


def sampled(request_id: str, index: int, position: int) -> SampledToken:
    finish = "length" if position == OUTPUT_TOKENS - 1 else None
    return SampledToken(index, position, token(request_id, index, position), finish_reason=finish)


class Pool:
    """An allocator that remembers who owns each block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.owner: dict[int, LegKey] = {}
        self.requests: dict[LegKey, EngineRequest] = {}
        self.running: dict[LegKey, dict[int, int]] = {}  # leg -> index -> next position
        self.alone: dict[LegKey, int] = {}  # steps of its own that a leg still gets
        self.had_turn = False  # the last step was of one leg alone

    def reserve(self, request: EngineRequest) -> Reservation | None:
        free = [block for block in range(self.num_blocks) if block not in self.owner]
        if len(free) < BLOCKS_PER_LEG:
            return None
        assert request.key not in self.requests
        blocks = free[:BLOCKS_PER_LEG]
        self.requests[request.key] = request  # type: ignore[index]
        if request.alone:
            self.alone[request.key] = ALONE_STEPS  # type: ignore[index]
        self.owner.update(dict.fromkeys(blocks, request.key))  # type: ignore[arg-type]
        return Reservation(blocks, 0)

    def lend(self, key: LegKey) -> Reservation:
        assert key not in self.running
        return Reservation([block for block, owner in self.owner.items() if owner == key], 0)

    def start_prefill(self, key: LegKey) -> None:
        request = self.requests[key]
        self.running[key] = {index: len(request.output_token_ids) for index in request.indices}

    def start_decode(self, key: LegKey, tokens: list[SampledToken]) -> None:
        assert {t.index for t in tokens} == set(self.requests[key].indices)
        self.running[key] = {t.index: t.position + 1 for t in tokens if t.finish_reason is None}

    def release(self, key: LegKey) -> None:
        self.requests.pop(key, None)
        self.running.pop(key, None)
        self.alone.pop(key, None)
        self.owner = {block: owner for block, owner in self.owner.items() if owner != key}

    def plan(self) -> list[LegKey]:
        """Legs of the next step: one that is to be alone, or, every other time, all others."""
        alone = [key for key in self.running if self.alone.get(key)]
        others = [key for key in self.running if key not in alone]
        self.had_turn = bool(alone) and not (others and self.had_turn)
        if not self.had_turn:
            return others
        self.alone[alone[0]] -= 1
        return alone[:1]


@dataclass(eq=False)
class Process:
    """name is a worker or router id. A dead process does nothing; a stopped one nothing until it goes on; one whose
    engine has broken computes nothing."""

    name: str
    incarnation: str
    alive: bool = True
    stopped: bool = False
    broken: bool = False
    info: WorkerInfo | None = None

    @property
    def runs(self) -> bool:
        return self.alive and not self.stopped

    @property
    def computes(self) -> bool:
        return self.runs and not self.broken


@dataclass(eq=False)
class DecodeProcess(Process):
    pool: Pool = field(init=False)
    table: LeaseTable = field(init=False)
    waiters: CreditWaiters = field(default_factory=CreditWaiters)
    writers: dict[str, WorkerInfo] = field(default_factory=dict)  # by incarnation, until told of their death
    targets: dict[LegKey, list[int]] = field(default_factory=dict)  # blocks that a writer was let into


@dataclass(eq=False)
class PutInFlight:
    key: LegKey
    decode: DecodeProcess
    blocks: list[int]


@dataclass(eq=False)
class PrefillProcess(Process):
    ledger: PrefillLedger = field(default_factory=PrefillLedger)
    epochs: dict[str, tuple[int, DecodeProcess]] = field(default_factory=dict)
    computing: dict[LegKey, int] = field(default_factory=dict)  # layer groups left
    held: dict[LegKey, int] = field(default_factory=dict)
    puts: list[PutInFlight] = field(default_factory=list)
    leaving: set[LegKey] = field(default_factory=set)  # of a guest: given up, and a step in flight computes them
    writes: dict[LegKey, list[int]] = field(default_factory=dict)  # of a guest: its lender's blocks
    lender: DecodeProcess | None = None


@dataclass(eq=False)
class RouterProcess(Process):
    """Attributes:
    seen: version of the view that it was shown last, and whether the workers were draining then.
    """

    router: SimulatedRouter = field(init=False)
    seen: tuple[int, bool] = (-1, False)


@functools.cache
def router_config(num_prefill: int, num_decode: int) -> Config:
    """Nothing is lost for good and nobody waits for too long: what is forgotten shows as a request without an end."""
    return Config(
        skip_tokenizer_init=True,
        mode="disaggregated" if num_prefill else "colocated",
        num_prefill_workers=num_prefill or 1,
        num_decode_workers=num_decode,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        max_queue_size=MAX_QUEUE_SIZE,
        max_queue_wait_s=1e9,
        max_replays=1000,
        lease_timeout_s=LEASE_TIMEOUT_S,
    )


def credit(pool: Pool) -> Credit:
    return Credit(pool.num_blocks - len(pool.owner), 8, len(pool.running), 0, len(pool.requests))
