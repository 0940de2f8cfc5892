"""Structs that the Coordinator exchanges with workers and routers, through Ray actor calls."""

from __future__ import annotations

from typing import Any

import msgspec

from pdray.wire.peers import Role


class Lent(msgspec.Struct, frozen=True):
    """Memory of a decode worker that its guests map.

    Attributes:
        host: names the machine, the same for all processes that run on it now.
        weights, pool: handles; see pdray.engine.kv.lent_memory.
    """

    host: str
    weights: str
    num_weight_bytes: int
    pool: str
    num_pool_bytes: int


class WorkerInfo(msgspec.Struct, frozen=True):
    """One live worker.

    Attributes:
        worker_id: stable name, e.g. "decode-0"; a restarted worker keeps it.
        incarnation: changes with every process that takes the name.
        fingerprint: of weights, dtype, block size and KV layout; peers must agree.
        channels: what each channel kind of this worker must be known by; see pdray.transfer.channel.Kind.facts.
        vocab_size: the model's; token ids are below it. None is not known.
        num_ranks: processes that share its model; each has some of the heads of every block.
        lends: what guests can map of its memory. lender: of a guest, the incarnation whose memory it computes in; it
            has no blocks of its own, and computes nothing without a lease.
    """

    worker_id: str
    incarnation: str
    role: Role
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
    lends: Lent | None = None
    lender: str = ""
    num_ranks: int = 1


class ChannelOffer(msgspec.Struct, frozen=True):
    """A decode worker's answer to a prefill worker that is to connect to it.

    Attributes:
        kind: of channel. data: what the kind's sender needs; opaque to everyone else.
        passed_over: kinds that would be faster, and why they cannot join the two.
    """

    kind: str
    data: Any = None
    passed_over: dict[str, str] = {}


class WorkerIdentity(msgspec.Struct, frozen=True):
    """A running worker's description of itself for a Coordinator that does not know it.

    Attributes:
        origin: of its configuration and the cluster's secret; a worker of another origin cannot be kept.
        epochs: of its channels, by peer: those open from a prefill worker, those accepted by a decode worker.
        writers: prefill workers, dead ones too, that may have been let into its blocks.
    """

    info: WorkerInfo
    origin: str
    epochs: dict[str, int]
    writers: list[WorkerInfo]


class WorkerLoading(msgspec.Struct, frozen=True):
    """What a worker tells it that loads still; `origin` as in WorkerIdentity.

    Attributes:
        lender: that it was started as a guest of; see WorkerInfo.
    """

    worker_id: str
    incarnation: str
    origin: str
    lender: str = ""


class Heartbeat(msgspec.Struct, frozen=True):
    """A worker's periodic report to the Coordinator.

    Attributes:
        epochs: of its channels, by peer, as in WorkerIdentity.
        routers: whose sessions are open: their sign of life.
        loop_failures: of its background loops: which, how often, and why the last time.
    """

    epochs: dict[str, int]
    routers: list[str]
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
        return bool(self.pairs) or any(worker.role == Role.BOTH for worker in self.workers)
