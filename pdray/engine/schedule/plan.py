"""The plan of one step and its results: the values that pass between scheduler and lane."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from pdray.engine.schedule.sequence import BlockCopy, LiveRequest, Sequence
from pdray.outputs import Logprob

LEAST_PROMPT_TOKENS = 16  # of a step whose share decodes have used up


class LaneName(enum.Enum):
    """The lanes of an engine. Steps of one lane run one after the other; those of two lanes may overlap."""

    MAIN = enum.auto()
    PROMPTS = enum.auto()


class Share(NamedTuple):
    """What the next step of a lane may hold.

    Attributes:
        decodes: sequences that decode; of none, prompts alone.
        tokens: at most so many, those of decodes included, of which there may be more; None: max_num_batched_tokens.
        prompts: chunks of prompts, at most; None: no limit.
    """

    lane: LaneName = LaneName.MAIN
    decodes: bool = True
    tokens: int | None = None
    prompts: int | None = None

    def budget(self, limit: int, num_decodes: int) -> int:
        """Tokens of a step that begins with so many decodes. limit: max_num_batched_tokens."""
        return limit if self.tokens is None else min(limit, max(self.tokens, num_decodes + LEAST_PROMPT_TOKENS))


EVERYTHING = Share()


class Draw(NamedTuple):
    """One token to be drawn from the logits of a chunk's token.

    Attributes:
        sequence: whose token it becomes.
        row: which of the chunk's tokens it follows, from 0.
        position: 0-based index among the sequence's output tokens.
    """

    sequence: Sequence
    row: int
    position: int


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, and what is drawn from them.

    Attributes:
        start: position of the first one; all before it are in the KV cache.
        draws: any number; none inside a prompt, one for each completion at its end.
        late_row: which draw of the step before is the chunk's only token; None: the host knows its tokens.
        num_scores: leading tokens that are followed by prompt tokens whose log-probabilities are asked for.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    draws: list[Draw]
    late_row: int | None = None
    num_scores: int = 0

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(slots=True, eq=False)
class StepPlan:
    """One forward pass.

    Attributes:
        copies: to be done before it; the plan holds a reference on each source until update().
        num_draws, num_scores: of all chunks.
        is_decode: each chunk is one token and draws one, and nobody is told of its layers.
        num_decodes: leading chunks of one token.
        alone: the request that it computes and no other, where that was asked for.
        planned_at, launched_at: on the engine's clock.
        lane: that computes it.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    num_tokens: int = 0
    num_draws: int = 0
    num_scores: int = 0
    is_decode: bool = True
    num_decodes: int = 0
    alone: LiveRequest | None = None
    planned_at: float = 0.0
    launched_at: float = 0.0
    lane: LaneName = LaneName.MAIN

    @property
    def keys(self) -> list[Hashable]:
        """Keys of the requests that it computes, each once."""
        return list(dict.fromkeys(chunk.sequence.request.key for chunk in self.chunks))

    @property
    def draws(self) -> list[Draw]:
        """Of all chunks, in order."""
        return [draw for chunk in self.chunks for draw in chunk.draws]

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Compute the sequence's next ``num_tokens`` tokens; from now on it counts as in flight."""
        start = sequence.num_computed_tokens
        late_row = sequence.pending_row if sequence.num_pending else None
        draws: list[Draw] = []
        if start + num_tokens == sequence.num_tokens:
            samplers = [sequence] if sequence.request.forked else sequence.request.sequences
            draws = [self._draw(sampler, num_tokens - 1) for sampler in samplers]
        num_scores = sequence.request.num_scores_between(start, start + num_tokens)
        self.chunks.append(Chunk(sequence, start, num_tokens, draws, late_row, num_scores))
        self.num_scores += num_scores
        if self.num_decodes == self.num_tokens and num_tokens == 1:
            self.num_decodes += 1
        self.num_tokens += num_tokens
        is_told_of = sequence.request.prefill_only  # layer by layer, which a decode step's graph does not do
        self.is_decode &= num_tokens == len(draws) == 1 and not num_scores and not is_told_of
        sequence.num_computed_tokens = start + num_tokens
        sequence.num_in_flight += 1
        sequence.lane = self.lane
        if sequence.pending_copy is not None:
            self.copies.append(sequence.pending_copy)
            sequence.pending_copy = None

    def _draw(self, sequence: Sequence, row: int) -> Draw:
        """Add a draw: the sequence has one more pending token from now on."""
        draw = Draw(sequence, row, sequence.num_output_tokens + sequence.num_pending)
        sequence.num_pending += 1
        sequence.pending_row = self.num_draws
        self.num_draws += 1
        return draw


class SampledRow(NamedTuple):
    """A drawn token, and its log-probabilities if they were asked for."""

    token_id: int
    logprobs: dict[int, Logprob] | None = None
