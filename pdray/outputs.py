"""Results of a request. Names follow vLLM's RequestOutput; the timings are pdray's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec


class Outcome(StrEnum):
    """How a request has ended, for metrics: complete (by its first completion's finish reason), or why not.

    REJECTED: it never had a place. ERROR: it had one.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"
    REJECTED = "rejected"


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """One token's log-probability under the raw logits.

    Attributes:
        rank: 1 is the most likely token of the vocabulary.
        decoded_token: its piece of the vocabulary (▁ as a space, special tokens verbatim). One that is only part of a
            character is written as bytes:\\xe2\\x9c, as by OpenAI. None until the router has detokenized it.
        token_bytes: the piece's bytes. Those of an output's tokens, joined, are its text's.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None
    token_bytes: bytes | None = None


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    """One sampled token of completion ``index``.

    Attributes:
        position: 0 for the first output token of the completion.
        logprobs: token id to Logprob, or None if not asked for.
        finish_reason: "stop" or "length" on the last token, else None.
        stop_reason: the stop token id; None for end-of-sequence and for length.
        is_text: of a last token with finish_reason "stop": it is the text's end, behind which a grammar lets nothing
            follow, and no end-of-sequence or stop token.
    """

    index: int
    position: int
    token_id: int
    logprobs: dict[int, Logprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    is_text: bool = False


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n completions.

    Attributes:
        finish_reason: "stop", "length", "abort", or None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
        logprobs: one dict per token of token_ids, token id to Logprob; None if not asked for.
        text_offsets: where in the text each of logprobs' tokens begins; for a later part of a character, where that
            begins. The end of the text for tokens that are cut from it. None if logprobs are.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    text_offsets: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestTimings:
    """The parts of one request's time, in seconds, each measured by the process that spent it.

    queue + lease_wait + prefill_queue + prefill = ttft, and transfer_wait + first_decode_step =
    first_gap, but for the two remainders (messages, event loops), which are never hidden.
    None: not reached, or not applicable (no transfer when the prefill was local).
    """

    queue: float | None = None  # arrival at the router until a lease is asked for
    lease_wait: float | None = None  # asked for until granted, as far as nothing was computed meanwhile
    prefill_queue: float | None = None  # at the prefill worker, received until first scheduled
    prefill: float | None = None  # first scheduled until the first token is sampled
    ttft: float | None = None  # arrival until the first token is at the router
    transfer_wait: float | None = None  # first token sampled until the decode batch is joined
    first_decode_step: float | None = None  # joined until the second token is sampled
    first_launch: float | None = None  # of first_decode_step: until the host had launched it
    first_gap: float | None = None  # first token at the router until the second one
    e2e: float | None = None  # arrival until the last token

    @property
    def ttft_unexplained(self) -> float | None:
        parts = (self.queue, self.lease_wait, self.prefill_queue, self.prefill)
        if self.ttft is None or any(part is None for part in parts):
            return None
        return self.ttft - sum(part for part in parts if part is not None)

    @property
    def first_gap_unexplained(self) -> float | None:
        if self.first_gap is None or self.first_decode_step is None:
            return None
        return self.first_gap - (self.transfer_wait or 0.0) - self.first_decode_step


@dataclass(slots=True)
class RequestOutput:
    """A request's prompt, its completions so far, and its timings.

    Attributes:
        num_cached_tokens: prompt tokens whose KV came from a prefix cache.
        prompt_logprobs: as CompletionOutput.logprobs, for each token of the prompt; None for the first one. None if not
            asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    timings: RequestTimings = field(default_factory=RequestTimings)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
