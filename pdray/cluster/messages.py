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
        free_blocks: blocks that a new lease could get (free, or cached and unreferenced).
        free_places: sequences that could still join the batch.
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
        gpu: names the physical GPU, "" on CPU. nccl: NCCL's version, "" if this process cannot use it.
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
    gpu: str = ""
    nccl: str = ""


class ChannelOffer(msgspec.Struct, frozen=True):
    """What a decode worker answers to a prefill worker that is to connect to it.

    Attributes:
        unique_id: of the nccl channel's communicator; opaque.
        piece_bytes: what one transfer of it holds at most.
    """

    kind: Literal["nccl", "object_store"]
    unique_id: Any = None
    piece_bytes: int = 0


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


class ClusterView(msgspec.Struct, frozen=True):
    """The cluster at one moment. A higher version is newer.

    Attributes:
        error: the last thing that kept a worker from starting or a pair from connecting, while it is not served.
    """

    version: int
    workers: list[WorkerInfo]
    pairs: list[Pair]
    error: str | None = None


# --- router → decode worker ---------------------------------------------------------------------


class LeaseRequest(LegMessage, frozen=True):
    """Ask for blocks and batch places for a leg.

    Attributes:
        indices: the completions this leg runs (all n of them on a first attempt).
        output_token_ids: what the one completion of a replayed leg has produced so far; only
            allowed with a single index.
        prefill_worker_id: who will fill the lease; None means that the decode worker prefills.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    indices: list[int]
    output_token_ids: list[int]
    prefill_worker_id: str | None
    priority: int = 0


class RenewLeases(Message, frozen=True):
    """Extend these leases. A lease that its router stops naming expires."""

    keys: list[LegKey]


class CloseLease(LegMessage, frozen=True):
    """End a lease, in whatever state. Idempotent; unknown keys are ignored."""

    reason: str


class EndCompletion(LegMessage, frozen=True):
    """The router has seen a stop string in one completion, and others of the leg go on. Unknown ones are ignored."""

    index: int


# --- decode worker → router ---------------------------------------------------------------------


class LeaseGranted(LegMessage, frozen=True):
    """Attributes:
    block_ids: the decode worker's blocks that hold the prompt, in order, cached ones included.
    num_cached_tokens: leading tokens (a multiple of the block size) that need no transfer.
    """

    block_ids: list[int]
    num_cached_tokens: int
    credit: Credit


class LeaseDenied(LegMessage, frozen=True):
    """Attributes:
    retriable: True if credit may come back; False if the leg can never fit.
    """

    reason: str
    retriable: bool
    credit: Credit


class LeaseClosed(LegMessage, frozen=True):
    """The decode worker ended the lease by itself: error, expiry, or the prefill worker's death."""

    reason: str


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
    """Sent when credit changed outside a step, and as the answer to RenewLeases (heartbeat)."""

    credit: Credit


def pack_hashes(hashes: Iterable[int]) -> bytes:
    return np.fromiter(hashes, dtype="<u8").tobytes()


def unpack_hashes(packed: bytes) -> list[int]:
    hashes: list[int] = np.frombuffer(packed, dtype="<u8").tolist()
    return hashes


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
        block_ids, num_cached_tokens: from LeaseGranted.
        decode_worker_id, epoch: the channel to push through; a worker that knows only another
            epoch answers PrefillFailed.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    indices: list[int]
    output_token_ids: list[int]
    decode_worker_id: str
    epoch: int
    block_ids: list[int]
    num_cached_tokens: int
    priority: int = 0


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
    reason: str


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


class OpenChannel(Message, frozen=True):
    """The sender enters the init of the communicator that was offered for this epoch; so should the receiver."""

    epoch: int


class Staged(LegMessage, frozen=True):
    """The beginning of a put lies in the sender's staging: asks for a grant.

    Attributes:
        seq: numbers the puts of one channel.
        first_layer, last_layer: half-open range.
        block_ids: the receiver's blocks. None at all: a probe of the channel, of no leg.
    """

    epoch: int
    seq: int
    first_layer: int
    last_layer: int
    block_ids: list[int]


# --- decode worker → prefill worker -------------------------------------------------------------


class GrantTransfers(Message, frozen=True):
    """The receiver receives these puts now, in this order, and nothing else from anyone until it has them."""

    epoch: int
    seqs: list[int]


class RefuseTransfer(Message, frozen=True):
    """The lease does not stand: the put is dropped where it is staged."""

    epoch: int
    seq: int


class TransferDone(Message, frozen=True):
    """Attributes:
    written: False if the lease ended before all of it was in the pool.
    """

    epoch: int
    seq: int
    written: bool


class ChannelFailed(Message, frozen=True):
    """The receiver has given this epoch's channel up."""

    epoch: int
    reason: str


class BeginPutReply(LegMessage, frozen=True):
    granted: bool


class AbortPut(LegMessage, frozen=True):
    """The lease was closed; stop writing and answer PutAborted. May be repeated."""


RouterToWorker = LeaseRequest | RenewLeases | CloseLease | EndCompletion | PrefillRequest | CancelPrefill | Ping
WorkerToRouter = (
    LeaseGranted | LeaseDenied | LeaseClosed | Tokens | CreditUpdate | FirstTokens | PrefillFailed | Pong | PrefixUpdate
)
PrefillToDecode = BeginPut | PutDone | PutAborted | OpenChannel | Staged
ChannelReply = GrantTransfers | RefuseTransfer | TransferDone | ChannelFailed
DecodeToPrefill = BeginPutReply | AbortPut | ChannelReply
AnyMessage = RouterToWorker | WorkerToRouter | PrefillToDecode | DecodeToPrefill
