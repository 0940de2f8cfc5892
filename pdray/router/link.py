"""What a router knows of one worker process: whether it is connected, its load, and what it has cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from pdray.control.credit import covers
from pdray.control.policy import DecodeState, PrefillState
from pdray.engine.schedule.demand import Demand
from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.lease_messages import Credit, CreditWanted
from pdray.wire.message import LegKey
from pdray.wire.peers import Role
from pdray.wire.worker_news import PrefixUpdate, unpack_hashes

NO_CREDIT = Credit(free_blocks=0, free_places=0, running=0, waiting=0, leases=0)


class Asked(NamedTuple):
    """What leases take of a decode worker."""

    blocks: int
    places: int


class WorkerLink:
    """Attributes:
    opened: its session is open.
    credit: the last that a decode worker told; none until it has.
    broken: it does prefill and decode, and has not served a probe: it gets no new requests.
    denied: it refused a lease, and has told no new credit since.
    wanted: it is to tell when it has this much credit, and has not.
    asked: blocks and places of leases asked for and not answered, by leg; changed by ask() and answered() alone.
    prefixes: short hashes of the blocks in its prefix cache, as it told last.
    failed: its engine has failed, and its process is about to end.
    queued: tokens for a prefill worker whose first token has not come back, by leg; from when the lease is asked for.
    """

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.opened = False
        self.credit = NO_CREDIT
        self.denied = False
        self.failed = False
        self.wanted: CreditWanted | None = None
        self.broken = False
        self.asked: dict[LegKey, Asked] = {}
        self._all_asked = Asked(0, 0)  # their sum
        self.queued: dict[LegKey, int] = {}
        self.told_queued_tokens = 0
        self.prefixes: set[int] = set()

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return self.opened and not self.failed

    @property
    def is_guest(self) -> bool:
        """It computes in the blocks of leases alone."""
        return bool(self.info.lender)

    def could_decode(self, demand: Demand) -> bool:
        """Whether the request would fit if nothing else were there."""
        info = self.info
        return (
            info.role != Role.PREFILL
            and demand.blocks < info.num_blocks  # one of them is a dummy
            and demand.places <= info.max_num_seqs
            and demand.length <= info.max_model_len
        )

    def could_prefill(self, demand: Demand) -> bool:
        """The same for its prompt alone."""
        return demand.tokens < self.info.max_model_len and demand.places <= self.info.max_num_seqs

    def update_credit(self, credit: Credit) -> None:
        self.credit, self.denied = credit, False
        if self.wanted is not None and covers(credit, self.wanted.blocks, self.wanted.places):
            self.wanted = None

    def want(self, demand: Demand) -> bool:
        """It is to tell when it can take this. False if it knows already, can take it, or will answer anyway."""
        wanted = CreditWanted(demand.blocks, demand.places)
        if (
            self.asked
            or wanted == self.wanted
            or (covers(self.credit, demand.blocks, demand.places) and not self.denied)
        ):
            return False
        self.wanted = wanted
        return True

    def ask(self, key: LegKey, demand: Demand) -> None:
        """A lease of so much is asked for."""
        self.answered(key)
        asked = self.asked[key] = Asked(demand.blocks, demand.places)
        self._all_asked = Asked(self._all_asked.blocks + asked.blocks, self._all_asked.places + asked.places)

    def answered(self, key: LegKey) -> None:
        """It is granted or denied, or nobody waits for it any more. Unknown ones are ignored."""
        if (asked := self.asked.pop(key, None)) is not None:
            self._all_asked = Asked(self._all_asked.blocks - asked.blocks, self._all_asked.places - asked.places)

    def expect_credit(self, blocks: int, places: int) -> None:
        """A lease ends without the worker saying so in its next step: count on what it held. If that is too early,
        the worker denies the next lease, and tells when it can grant one."""
        credit = self.credit
        self.credit = msgspec.structs.replace(
            credit, free_blocks=credit.free_blocks + blocks, free_places=credit.free_places + places
        )

    def prefill_ended(self, key: LegKey) -> None:
        """A leg that was sent waits at this prefill worker no longer."""
        self.told_queued_tokens = max(0, self.told_queued_tokens - self.queued.pop(key, 0))

    def update_prefixes(self, message: PrefixUpdate) -> None:
        if message.is_all:
            self.prefixes.clear()
        self.prefixes.difference_update(unpack_hashes(message.removed))
        self.prefixes.update(unpack_hashes(message.added))

    def num_cached(self, hashes: Sequence[int]) -> int:
        """Leading blocks of a prompt, by their short hashes, that it has cached."""
        return next((i for i, each in enumerate(hashes) if each not in self.prefixes), len(hashes))

    def decode_state(self, hashes: Sequence[int] = ()) -> DecodeState:
        return DecodeState(
            self.info.worker_id,
            self.info.role == Role.BOTH,
            NO_CREDIT if self.denied else self.credit,
            self.info.num_blocks,
            asked_blocks=self._all_asked.blocks,
            asked_places=self._all_asked.places,
            cached_tokens=self.num_cached(hashes) * self.info.block_size,
        )

    def prefill_state(self, hashes: Sequence[int] = ()) -> PrefillState:
        """Other routers' tokens show only in what the worker told; this router's own show at once."""
        return PrefillState(
            self.info.worker_id,
            max(self.told_queued_tokens, sum(self.queued.values())),
            self.info.max_num_batched_tokens,
            self.num_cached(hashes) * self.info.block_size,
        )
