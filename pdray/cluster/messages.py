"""Wire types: every message between routers and workers, and between workers.

msgspec structs, tagged, array-like, encoded as msgpack. A *leg* is one attempt to run some of a
request's completions on one decode worker; the pair (request_id, attempt) names it, and every
message about it carries that pair, so that a stale attempt is recognised anywhere. Durations are
in seconds, measured by the sender on its own clock; no message holds a time of day.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from pdray.cluster.losses import Verdict
from pdray.outputs import SampledToken
from pdray.sampling_params import SamplingParams


class LegKey(NamedTuple):
    """Names one leg. Attempts of a request are numbered from 0, in the order they are made."""

    request_id: str
    attempt: int


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of every message."""


class LegMessage(Message, frozen=True):
    """Base of every message about one leg."""

    request_id: str
    attempt: int

    @property
    def key(self) -> LegKey:
        return LegKey(self.request_id, self.attempt)


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """What a decode worker can still take, and how busy it is.

    Attributes:
        free_blocks: blocks that a new lease could get (free, or cached and unreferenced); none while a preempted
            sequence waits for its own.
        free_places: sequences that could still join the batch; likewise.
        running: sequences in the batch. waiting: preempted or locally queued sequences.
        leases: live leases in any state.
    """

    free_blocks: int
    free_places: int
    running: int
    waiting: int
    leases: int


# --- what the Coordinator tells everyone ----------------------------------------------------------


class WorkerInfo(msgspec.Struct, frozen=True):
    """One live worker.

    Attributes:
        worker_id: stable name, e.g. "decode-0"; a restarted worker keeps it.
        incarnation: changes with every process that takes the name.
        fingerprint: of weights, dtype, block size and KV layout; peers must agree.
        channels: what each channel kind of this worker must be known by; see pdray.transfer.channel.Kind.facts.
        vocab_size: the model's; token ids are below it. None is not known.
    """

    worker_id: str
    incarnation: str
    role: Literal["prefill", "decode", "both"]
    host: str
    port: int
    pid: int
    node_id: str
    device: str
    fingerprint: str
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    channels: dict[str, dict[str, str]] = {}
    vocab_size: int | None = None


class ChannelOffer(msgspec.Struct, frozen=True):
    """What a decode worker answers to a prefill worker that is to connect to it.

    Attributes:
        kind: of channel. data: what the kind's sender needs; opaque to everyone else.
    """

    kind: str
    data: Any = None


class WorkerIdentity(msgspec.Struct, frozen=True):
    """What a started worker tells a Coordinator that knows nothing of it.

    Attributes:
        origin: of its configuration and the cluster's secret; a worker of another origin cannot be kept.
        epochs: of its channels, by peer: those open from a prefill worker, those accepted by a decode worker.
        writers: prefill workers, dead ones too, that may have been let into its blocks.
    """

    info: WorkerInfo
    origin: str
    epochs: dict[str, int]
    writers: list[WorkerInfo]


class Heartbeat(msgspec.Struct, frozen=True):
    """What a worker tells the Coordinator, again and again.

    Attributes:
        epochs: of its channels, by peer, as in WorkerIdentity.
        num_routers: whose sessions are open: their sign of life.
        loop_failures: of its background loops: which, how often, and why the last time.
    """

    epochs: dict[str, int]
    num_routers: int
    loop_failures: dict[str, str]


class Pair(msgspec.Struct, frozen=True):
    """A connected channel from a prefill worker to a decode worker."""

    prefill_worker_id: str
    decode_worker_id: str
    epoch: int


class Draining(msgspec.Struct, frozen=True):
    """The workers are about to end: no new requests; what runs may go on for `left_s` seconds."""

    reason: str
    left_s: float


class ClusterView(msgspec.Struct, frozen=True):
    """The cluster at one moment. A higher version is newer.

    Attributes:
        error: what keeps a worker from starting or a pair from connecting, while it is not served.
        draining: None in normal times.
    """

    version: int
    workers: list[WorkerInfo]
    pairs: list[Pair]
    error: str | None = None
    draining: Draining | None = None

    @property
    def can_serve(self) -> bool:
        """Whether a request could be served."""
        return bool(self.pairs) or any(worker.role == "both" for worker in self.workers)


# --- router → decode worker ---------------------------------------------------------------------


class LeaseRequest(LegMessage, frozen=True):
    """Ask for blocks and batch places for a leg.

    Attributes:
        indices: the completions this leg runs (all n of them on a first attempt).
        output_token_ids: what the one completion of a replayed leg has produced so far; only
            allowed with a single index.
        prefill_worker_id: who will fill the lease; None means that the decode worker prefills.
        alone: the leg is under suspicion: its first steps compute nothing else.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    indices: list[int]
    output_token_ids: list[int]
    prefill_worker_id: str | None
    priority: int = 0
    alone: bool = False


class CreditWanted(msgspec.Struct, frozen=True, array_like=True):
    """What the request that waits first at a router needs; see pdray.engine.schedule.demand.Demand."""

    blocks: int
    places: int


class RenewLeases(Message, frozen=True):
    """Extend these leases. A lease that its router stops naming expires. Answered by a CreditUpdate.

    Attributes:
        wanted: send another CreditUpdate as soon as there is so much credit; replaces what was said before.
    """

    keys: list[LegKey]
    wanted: CreditWanted | None = None


class CloseLease(LegMessage, frozen=True):
    """End a lease, in whatever state. Idempotent; unknown keys are ignored."""

    reason: str


class EndCompletion(LegMessage, frozen=True):
    """The router has seen a stop string in one completion, and others of the leg go on. Unknown ones are ignored."""

    index: int


# --- decode worker → router ---------------------------------------------------------------------


class LeaseGranted(LegMessage, frozen=True):
    """Attributes:
    num_cached_tokens: leading tokens (a multiple of the block size) that need no transfer.
    """

    num_cached_tokens: int
    credit: Credit


class LeaseDenied(LegMessage, frozen=True):
    """Attributes:
    retriable: True if credit may come back; False if the leg can never fit.
    verdict, param: of one that is not retriable; see losses.py.
    """

    reason: str
    retriable: bool
    credit: Credit
    verdict: Verdict = "invalid"
    param: str | None = None


class LeaseClosed(LegMessage, frozen=True):
    """The decode worker ended the lease by itself: error, expiry, or the prefill worker's death.

    Attributes:
        lost_worker_id: the worker that died, if that is why.
    """

    reason: str
    verdict: Verdict = "lost"
    lost_worker_id: str = ""


class Tokens(Message, frozen=True):
    """All of one step's new tokens for one router, and the worker's credit after it."""

    updates: list[LegTokens]
    credit: Credit


class LegTokens(LegMessage, frozen=True):
    """New tokens of one leg. Timings ride on the first message that knows them.

    Attributes:
        prefill_queue, prefill: of a local prefill, with position 0.
        transfer_wait: of a disaggregated leg, prefill sampled its token until joined the batch,
            as far as the decode worker saw it; with first_decode_step, on the first decoded token.
    """

    tokens: list[SampledToken]
    num_cached_tokens: int | None = None
    prefill_queue: float | None = None
    prefill: float | None = None
    transfer_wait: float | None = None
    first_decode_step: float | None = None


class CreditUpdate(Message, frozen=True):
    """The answer to RenewLeases (heartbeat), and sent again when there is what that has wanted."""

    credit: Credit


def pack_hashes(hashes: Iterable[int]) -> bytes:
    return np.fromiter(hashes, dtype="<u8").tobytes()


def unpack_hashes(packed: bytes) -> list[int]:
    hashes: list[int] = np.frombuffer(packed, dtype="<u8").tolist()
    return hashes


class StepFailed(Message, frozen=True):
    """The worker's engine has failed, or hangs, and its process ends: everything that it held is lost.

    Attributes:
        suspects: the legs, of all routers, that the steps in flight computed; empty if that is not known.
    """

    reason: str
    suspects: list[LegKey]


class PrefixUpdate(Message, frozen=True):
    """What a worker's prefix cache holds, for routing; sent to every router when it connects and now and then.

    Attributes:
        added, removed: 8 bytes for each block: its short hash, little-endian. is_all: added is everything.
    """

    added: bytes
    removed: bytes = b""
    is_all: bool = False


# --- router → prefill worker --------------------------------------------------------------------


class PrefillRequest(LegMessage, frozen=True):
    """Prefill a leg and push its blocks into the lease's.

    Attributes:
        num_cached_tokens: from LeaseGranted.
        decode_worker_id, epoch: the channel to push through; a worker that knows only another
            epoch answers PrefillFailed. None where the first token ends the leg: no lease, and nothing is pushed.
        alone: see LeaseRequest.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    indices: list[int]
    output_token_ids: list[int]
    decode_worker_id: str | None
    epoch: int
    num_cached_tokens: int
    priority: int = 0
    alone: bool = False


class CancelPrefill(LegMessage, frozen=True):
    """Stop as soon as possible. Idempotent; unknown keys are ignored."""


class Ping(Message, frozen=True):
    """Answered by Pong; a router's heartbeat to a prefill worker."""


# --- prefill worker → router --------------------------------------------------------------------


class FirstTokens(LegMessage, frozen=True):
    """The leg's first token for each index; what TTFT ends with.

    Attributes:
        num_cached_tokens: prompt tokens that the prefill worker found in its own prefix cache.
    """

    tokens: list[SampledToken]
    num_cached_tokens: int
    prefill_queue: float
    prefill: float


class PrefillFailed(LegMessage, frozen=True):
    """The leg cannot be prefilled here.

    Attributes:
        verdict, param: see losses.py.
        lost_worker_id: the decode worker that is gone, if that is why.
    """

    reason: str
    verdict: Verdict = "lost"
    param: str | None = None
    lost_worker_id: str = ""


class Pong(Message, frozen=True):
    """Attributes:
    queued_tokens: prompt tokens received and not yet computed.
    """

    queued_tokens: int


# --- prefill worker → decode worker -------------------------------------------------------------


class BeginPut(LegMessage, frozen=True):
    """Ask to start writing into the lease; sent as soon as the leg is queued at the prefill worker.
    No byte is written before BeginPutReply says yes. May be repeated."""

    epoch: int


class PutDone(LegMessage, frozen=True):
    """Every put of the leg was issued; READY once ``num_puts`` of them have arrived.

    Attributes:
        tokens: the first token of each index, which decode continues from.
        put_tail: seconds from the first token's sampling until this message.
    """

    num_puts: int
    tokens: list[SampledToken]
    put_tail: float


class PutAborted(LegMessage, frozen=True):
    """No put of this leg is in flight and none will start: a quarantine may end."""


# --- decode worker → prefill worker -------------------------------------------------------------


class BeginPutReply(LegMessage, frozen=True):
    granted: bool


class AbortPut(LegMessage, frozen=True):
    """The lease was closed; stop writing and answer PutAborted. May be repeated."""


# --- both ways between a prefill and a decode worker --------------------------------------------


class ChannelMessage(Message, frozen=True):
    """What the two ends of a channel say to each other.

    Attributes:
        kind: of channel. payload: opaque to everyone but that kind.
    """

    kind: str
    epoch: int
    payload: bytes


RouterToWorker = LeaseRequest | RenewLeases | CloseLease | EndCompletion | PrefillRequest | CancelPrefill | Ping
WorkerToRouter = (
    LeaseGranted
    | LeaseDenied
    | LeaseClosed
    | Tokens
    | CreditUpdate
    | FirstTokens
    | PrefillFailed
    | Pong
    | PrefixUpdate
    | StepFailed
)
PrefillToDecode = BeginPut | PutDone | PutAborted | ChannelMessage
DecodeToPrefill = BeginPutReply | AbortPut | ChannelMessage
AnyMessage = RouterToWorker | WorkerToRouter | PrefillToDecode | DecodeToPrefill
