"""Messages between a router and a prefill worker: prompts, first tokens and the queue's length."""

from __future__ import annotations

from pdray.outputs import SampledToken
from pdray.prompt_scores import PromptScores
from pdray.sampling_params import SamplingParams
from pdray.wire.message import LegMessage, Message, Verdict


class PrefillRequest(LegMessage, frozen=True):
    """Prefill a leg and push its blocks into the lease's.

    Attributes:
        num_cached_tokens: from LeaseGranted.
        decode_worker_id, epoch: the channel to push through; a worker that knows only another
            epoch answers PrefillFailed. None where the first token ends the leg: no lease, and nothing is pushed.
        alone: see LeaseRequest.
        has_lease: False where its lease is still being asked for: the leg may be computed, and its decode worker is
            asked nothing before LeaseConfirmed. num_cached_tokens is not known then.
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
    has_lease: bool = True


class LeaseConfirmed(LegMessage, frozen=True):
    """The lease of a leg that was sent without one stands. Unknown keys are ignored.

    Attributes:
        num_cached_tokens: from LeaseGranted.
    """

    num_cached_tokens: int


class CancelPrefill(LegMessage, frozen=True):
    """Stop as soon as possible. Idempotent; unknown keys are ignored."""


class Ping(Message, frozen=True):
    """Answered by Pong; a router's heartbeat to a prefill worker."""


class FirstTokens(LegMessage, frozen=True):
    """The leg's first token for each index; what TTFT ends with.

    Attributes:
        num_cached_tokens: prompt tokens that the prefill worker found in its own prefix cache.
        prompt_scores: where params ask for prompt_logprobs.
    """

    tokens: list[SampledToken]
    num_cached_tokens: int
    prefill_queue: float
    prefill: float
    prompt_scores: PromptScores | None = None


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
