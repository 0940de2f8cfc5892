"""Messages between a router and a decode worker: leases, credit and tokens."""

from __future__ import annotations

import msgspec

from pdray.outputs import SampledToken
from pdray.prompt_scores import PromptScores
from pdray.sampling_params import SamplingParams
from pdray.wire.message import LegKey, LegMessage, Message, Verdict


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """The capacity that a decode worker has left, and its load.

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


class CreditWanted(msgspec.Struct, frozen=True, array_like=True):
    """The demand of a router's first waiting request; see pdray.engine.schedule.demand.Demand."""

    blocks: int
    places: int


class LeaseRequest(LegMessage, frozen=True):
    """Ask for blocks and batch places for a leg.

    Attributes:
        indices: the completions this leg runs (all n of them on a first attempt).
        output_token_ids: what the one completion of a replayed leg has produced so far; only
            allowed with a single index.
        prefill_worker_id: who will fill the lease; None means that the decode worker prefills.
        alone: the leg is under suspicion: its first steps compute nothing else.
        whole: nobody reads the answer before its end: tokens may come late, those of many steps in one message.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    indices: list[int]
    output_token_ids: list[int]
    prefill_worker_id: str | None
    priority: int = 0
    alone: bool = False
    whole: bool = False


class RenewLeases(Message, frozen=True):
    """Extend these leases. A lease that its router stops naming expires. Answered by a CreditUpdate.

    Attributes:
        wanted: send another CreditUpdate as soon as there is so much credit; replaces the former wish.
    """

    keys: list[LegKey]
    wanted: CreditWanted | None = None


class CloseLease(LegMessage, frozen=True):
    """End a lease, in whatever state. Idempotent; unknown keys are ignored."""

    reason: str


class EndCompletion(LegMessage, frozen=True):
    """The router has seen a stop string in one completion, and others of the leg go on. Unknown ones are ignored."""

    index: int


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


class LegTokens(LegMessage, frozen=True):
    """New tokens of one leg, by position for each index. Timings ride on the first message that knows them.

    Attributes:
        prefill_queue, prefill: of a local prefill, with position 0.
        transfer_wait: of a disaggregated leg, prefill sampled its token until joined the batch,
            as far as the decode worker saw it; with first_decode_step, on the first decoded token.
        first_launch: of first_decode_step, until the step was launched.
        prompt_scores: of a local prefill, where params ask for prompt_logprobs.
    """

    tokens: list[SampledToken]
    num_cached_tokens: int | None = None
    prefill_queue: float | None = None
    prefill: float | None = None
    transfer_wait: float | None = None
    first_decode_step: float | None = None
    first_launch: float | None = None
    prompt_scores: PromptScores | None = None


class Tokens(Message, frozen=True):
    """One step's new tokens for one router, earlier ones that could wait, and the credit after it."""

    updates: list[LegTokens]
    credit: Credit


class CreditUpdate(Message, frozen=True):
    """The answer to RenewLeases (heartbeat), sent again when the credit that it asked for is there."""

    credit: Credit
