"""The decode worker's leases: who holds which blocks and places, and who may still write into them.

    GRANTED ──begin_put──▶ FILLING ──put_done, every put arrived──▶ RUNNING ──finished──▶ closed
       │                      │
       └──close──▶ closed     └──close──▶ QUARANTINE ──put_aborted / worker_gone──▶ closed

Blocks that another process may still write are never freed by a timeout: they stay in
QUARANTINE until that process has said that it stopped, or was seen dead. Before begin_put no process
may write, so a lease closed while GRANTED frees at once, and a begin_put that comes later is refused.

Pure: time and messages go in, effects come out. Single-threaded.
"""

from __future__ import annotations

from collections.abc import Callable, KeysView

from pdray.control.effects import Send
from pdray.control.lease import Allocator, Lease, LeaseInfo, LeaseState, Writer, engine_request
from pdray.errors import InvalidRequestError, RequestFailedError
from pdray.wire.lease_messages import Credit, LeaseClosed, LeaseDenied, LeaseGranted, LeaseRequest, LegTokens, Tokens
from pdray.wire.message import LegKey, Verdict
from pdray.wire.put_messages import AbortPut, BeginPut, BeginPutReply, PutDone


class LeaseTable:
    """All leases of one decode worker.

    Args:
        allocator: the engine; its keys are LegKeys.
        credit: what the worker can take now, for the replies.
        lease_timeout_s: a lease not renewed for so long is closed.
        block_size: tokens of one block.
    """

    def __init__(
        self, allocator: Allocator, credit: Callable[[], Credit], lease_timeout_s: float, block_size: int
    ) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._credit = credit
        self._timeout_s = lease_timeout_s
        self._leases: dict[LegKey, Lease] = {}
        self._by_request: dict[str, list[LegKey]] = {}
        self._writers: dict[str, Writer] = {}

    def leases(self, now: float) -> list[LeaseInfo]:
        return [
            LeaseInfo(
                *key,
                str(lease.state),
                lease.router_id,
                lease.request.prefill_worker_id,
                len(lease.reservation.block_ids),
                lease.expires - now,
            )
            for key, lease in self._leases.items()
        ]

    def keys(self) -> KeysView[LegKey]:
        return self._leases.keys()

    def router_of(self, key: LegKey) -> str | None:
        """The router that gets this leg's tokens; None once its lease is closed or quarantined."""
        lease = self._leases.get(key)
        return None if lease is None or lease.state is LeaseState.QUARANTINE else lease.router_id

    def transfer_wait(self, key: LegKey) -> float | None:
        """Seconds from the first token's sampling until the leg's last block arrived, as far as the two
        workers saw it; None for a local prefill."""
        lease = self._leases.get(key)
        return None if lease is None else lease.transfer_wait

    # routers

    def request(self, now: float, router_id: str, message: LeaseRequest) -> list[Send]:
        """Grant or deny. Asked again for a live lease: the same grant. A newer attempt at the same
        completions closes the older one; an older attempt than a live one is denied."""
        effects: list[Send] = []
        for key in tuple(self._by_request.get(message.request_id, ())):
            other = self._leases[key]
            if other.state is LeaseState.QUARANTINE:
                continue
            if key.attempt == message.attempt:
                return [self._grant(other)]
            if not set(other.request.indices) & set(message.indices):
                continue
            if key.attempt > message.attempt:
                return [self._deny(router_id, message, f"attempt {key.attempt} has replaced it", retriable=False)]
            effects += self._end(key, other)
        try:
            reservation = self._allocator.reserve(engine_request(message))
        except InvalidRequestError as error:
            denied = LeaseDenied(*message.key, str(error), False, self._credit(), "invalid", error.param)
            return [*effects, Send(router_id, denied)]
        except RequestFailedError as error:
            denied = LeaseDenied(*message.key, str(error), False, self._credit(), "failed")
            return [*effects, Send(router_id, denied)]
        if reservation is None:
            return [*effects, self._deny(router_id, message, "no free blocks or places", retriable=True)]
        local = message.prefill_worker_id is None
        lease = Lease(
            router_id,
            message,
            reservation,
            LeaseState.RUNNING if local else LeaseState.GRANTED,
            now + self._timeout_s,
        )
        self._leases[key := message.key] = lease
        self._by_request.setdefault(message.request_id, []).append(key)
        if local:
            self._allocator.start_prefill(key)
        return [*effects, self._grant(lease)]

    def renew(self, now: float, router_id: str, keys: list[LegKey]) -> None:
        """Extend the named leases of that router."""
        for key in keys:
            lease = self._leases.get(key)
            if lease is not None and lease.router_id == router_id:
                lease.expires = now + self._timeout_s

    def close(self, key: LegKey) -> list[Send]:
        """The router wants no more of this leg. Unknown keys are ignored."""
        lease = self._leases.get(key)
        return [] if lease is None else self._end(key, lease)

    def router_gone(self, router_id: str) -> list[Send]:
        """Close every lease of a router that died or was cut off."""
        return [
            effect
            for key, lease in list(self._leases.items())
            if lease.router_id == router_id
            for effect in self._end(key, lease)
        ]

    def expire(self, now: float) -> list[Send]:
        """Close every lease past its deadline. Quarantines have none."""
        return self._end_all(
            lambda lease: lease.state is not LeaseState.QUARANTINE and lease.expires <= now,
            f"not renewed for {self._timeout_s:g} s (lease_timeout_s)",
        )

    def close_all(self, reason: str) -> list[Send]:
        """The worker stops."""
        return self._end_all(lambda lease: lease.state is not LeaseState.QUARANTINE, reason)

    # the engine

    def finished(self, key: LegKey) -> list[Send]:
        """The engine has ended this leg's last completion and taken its blocks back."""
        lease = self._leases.get(key)
        if lease is not None:
            assert lease.state is LeaseState.RUNNING, (key, lease)
            self._forget(key)
        return []

    def failed(self, key: LegKey, reason: str, verdict: Verdict) -> list[Send]:
        """The engine has given up this leg, with the step that computed it, and taken its blocks back."""
        lease = self._leases.get(key)
        if lease is None:
            return []
        assert lease.state is LeaseState.RUNNING, (key, lease)
        self._free(key)
        return [Send(lease.router_id, LeaseClosed(*key, reason, verdict))]

    # prefill workers

    def set_writer(self, worker_id: str, incarnation: str, epoch: int, *, is_guest: bool = False) -> list[Send]:
        """A prefill worker is connected in this epoch. What it was filling in an older one is aborted."""
        previous = self._writers.get(worker_id)
        self._writers[worker_id] = Writer(incarnation, epoch, is_guest)
        if previous is None or previous == self._writers[worker_id]:
            return []
        return self._end_all(
            lambda lease: lease.state is LeaseState.FILLING and self._written_by(lease, worker_id),
            f"the channel from {worker_id} was reconnected",
        )

    def epochs(self) -> dict[str, int]:
        """Epochs of the accepted channels, by prefill worker."""
        return {worker_id: writer.epoch for worker_id, writer in self._writers.items()}

    def begin_put(self, worker_id: str, message: BeginPut) -> list[Send]:
        """May this worker write into this lease from now on? Asked again, the answer is the same."""
        lease = self._leases.get(message.key)
        writer = self._writers.get(worker_id)
        granted = (
            lease is not None
            and writer is not None
            and lease.request.prefill_worker_id == worker_id
            and message.epoch == writer.epoch
            and (lease.state is LeaseState.GRANTED or (lease.state is LeaseState.FILLING and lease.writer == writer))
        )
        if granted:
            assert lease is not None and writer is not None
            lease.state, lease.writer = LeaseState.FILLING, writer
            if writer.is_guest:
                lease.reservation = self._allocator.lend(message.key)
                return [Send(worker_id, BeginPutReply(*message.key, True, *lease.reservation))]
        return [Send(worker_id, BeginPutReply(*message.key, granted))]

    def may_write(self, key: LegKey, worker_id: str, epoch: int) -> bool:
        """Whether a put that has just arrived may be written into the pool."""
        lease = self._leases.get(key)
        return (
            lease is not None
            and lease.state is LeaseState.FILLING
            and lease.request.prefill_worker_id == worker_id
            and lease.writer is not None
            and lease.writer.epoch == epoch
        )

    def resolve(self, key: LegKey, worker_id: str, epoch: int, positions: range) -> list[int] | None:
        """The blocks at these places of the leg, for a put of that worker.

        None if it may not write now, or if the lease does not hold them all. Blocks that were cached when the lease was
        granted are not the leg's to be written: others read them.
        """
        if not self.may_write(key, worker_id, epoch):
            return None
        blocks, num_cached_tokens = self._leases[key].reservation
        first = num_cached_tokens // self._block_size
        return (
            blocks[positions.start : positions.stop]
            if first <= positions.start < positions.stop <= len(blocks)
            else None
        )

    def writable(self, key: LegKey) -> range:
        """Places of a leg that is being filled which are its writer's to fill: those that were not cached."""
        lease = self._leases.get(key)
        if lease is None or lease.state is not LeaseState.FILLING:
            return range(0)
        blocks, num_cached_tokens = lease.reservation
        return range(num_cached_tokens // self._block_size, len(blocks))

    def refuse(self, key: LegKey, reason: str) -> list[Send]:
        """Close a lease whose writer named blocks that it does not hold, and so cannot be trusted."""
        lease = self._leases[key]
        return [*self._end(key, lease), Send(lease.router_id, LeaseClosed(*key, reason))]

    def put_received(self, now: float, key: LegKey) -> list[Send]:
        """One put was written into the pool."""
        lease = self._leases[key]
        lease.puts_received += 1
        return self._start_if_ready(now, key, lease)

    def put_done(self, now: float, worker_id: str, message: PutDone) -> list[Send]:
        """Every put of the leg was issued; stale ones are ignored."""
        lease = self._leases.get(message.key)
        if lease is None or lease.state is not LeaseState.FILLING or lease.request.prefill_worker_id != worker_id:
            return []
        lease.put_done, lease.put_done_at = message, now
        return self._start_if_ready(now, message.key, lease)

    def put_aborted(self, worker_id: str, key: LegKey) -> list[Send]:
        """End a quarantine: that worker has no put of this leg in flight and will start none."""
        lease = self._leases.get(key)
        if lease is None or lease.request.prefill_worker_id != worker_id:
            return []
        if lease.state is LeaseState.QUARANTINE:
            self._free(key)
            return []
        if lease.state is LeaseState.FILLING:  # its channel failed: nothing more will come
            self._free(key)
            return [Send(lease.router_id, LeaseClosed(*key, f"{worker_id} could not push its blocks"))]
        return []

    def worker_gone(self, worker_id: str, incarnation: str) -> list[Send]:
        """Close the leases that a dead process was filling, and free those it kept in quarantine."""
        effects = []
        for key, lease in list(self._leases.items()):
            if (
                lease.writer is None
                or not self._written_by(lease, worker_id)
                or lease.writer.incarnation != incarnation
            ):
                continue
            if lease.state is LeaseState.QUARANTINE:
                self._free(key)
            elif lease.state is LeaseState.FILLING:
                self._free(key)
                closed = LeaseClosed(*key, f"{worker_id} died", lost_worker_id=worker_id)
                effects.append(Send(lease.router_id, closed))
        writer = self._writers.get(worker_id)
        if writer is not None and writer.incarnation == incarnation:
            del self._writers[worker_id]
        return effects

    def link_restored(self, worker_id: str) -> list[Send]:
        """A new session to that worker: what was lost with the old one is asked again."""
        return [
            Send(worker_id, AbortPut(*key))
            for key, lease in self._leases.items()
            if lease.state is LeaseState.QUARANTINE and self._written_by(lease, worker_id)
        ]

    # transitions

    def _start_if_ready(self, now: float, key: LegKey, lease: Lease) -> list[Send]:
        if lease.put_done is None or lease.puts_received < lease.put_done.num_puts:
            return []
        tokens = lease.put_done.tokens
        lease.transfer_wait = lease.put_done.put_tail + now - lease.put_done_at
        lease.state = LeaseState.RUNNING
        self._allocator.start_decode(key, tokens)
        if all(token.finish_reason is not None for token in tokens):
            self._free(key)
        # The router has the first tokens from the prefill worker, unless that message is late or died with its sender:
        # told again here, they are before the leg's next ones on the same session.
        return [Send(lease.router_id, Tokens([LegTokens(*key, tokens)], self._credit()))]

    def _end(self, key: LegKey, lease: Lease) -> list[Send]:
        """Close: at once, or through quarantine if a prefill worker may be writing."""
        if lease.state is LeaseState.QUARANTINE:
            return []
        if lease.state is LeaseState.FILLING:
            lease.state = LeaseState.QUARANTINE
            assert lease.request.prefill_worker_id is not None
            return [Send(lease.request.prefill_worker_id, AbortPut(*key))]
        self._free(key)
        return []

    def _end_all(self, condition: Callable[[Lease], bool], reason: str) -> list[Send]:
        effects = []
        for key, lease in list(self._leases.items()):
            if condition(lease):
                effects += [*self._end(key, lease), Send(lease.router_id, LeaseClosed(*key, reason))]
        return effects

    def _free(self, key: LegKey) -> None:
        self._forget(key)
        self._allocator.release(key)

    def _forget(self, key: LegKey) -> None:
        del self._leases[key]
        keys = self._by_request[key.request_id]
        keys.remove(key)
        if not keys:
            del self._by_request[key.request_id]

    def _written_by(self, lease: Lease, worker_id: str) -> bool:
        return lease.request.prefill_worker_id == worker_id

    def _grant(self, lease: Lease) -> Send:
        num_cached_tokens = lease.reservation.num_cached_tokens
        return Send(lease.router_id, LeaseGranted(*lease.request.key, num_cached_tokens, self._credit()))

    def _deny(self, router_id: str, message: LeaseRequest, reason: str, *, retriable: bool) -> Send:
        return Send(router_id, LeaseDenied(*message.key, reason, retriable, self._credit()))
