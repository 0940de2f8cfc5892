"""A request inside the engine, and its completions: what they have produced, computed and hold."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from pdray.engine.grammar.grammar import Grammar
from pdray.engine.kv.block_pool import hash_blocks, salted
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.rules import History, Rule, make_rules
from pdray.kernels.sampling.metadata import has_penalty
from pdray.prompt_scores import PromptScores, num_words
from pdray.prompt_scores import Words as ScoreWords
from pdray.sampling_params import SamplingParams, wrap_seed

# Steps that draw, after which a request that was to be computed alone joins the others. The step that failed was at
# most two draws ahead of the tokens that it goes on from; the first draw is the prompt's, the others are of decoding.
ALONE_STEPS = 4


class SequenceStatus(enum.Enum):
    """The state of one completion."""

    WAITING = enum.auto()  # queued; holds no blocks
    RESERVED = enum.auto()  # holds blocks; nothing is computed for it
    RUNNING = enum.auto()  # holds blocks; part of every step that has room
    FORKING = enum.auto()  # holds blocks; waits for the first completion's prefill
    HELD = enum.auto()  # prefill_only and done: keeps its blocks until release()
    FINISHED = enum.auto()  # holds nothing


class BlockCopy(NamedTuple):
    """A block to copy, in all layers."""

    source: int
    destination: int


class Sequence:
    """One completion of one request.

    Attributes:
        token_ids: prompt and outputs that the host knows. Before the fork, a request's sequences share one list.
        num_pending: tokens that steps in flight draw for it: they follow token_ids, and only the device knows them.
        pending_row: which of the last planned step's draws is its own.
        num_in_flight: steps in flight that compute tokens of it, and so write to its blocks.
        lane: a LaneName: of all these steps.
        num_prompt_tokens: of token_ids; what follows are outputs, wherever they were made.
        num_computed_tokens: leading tokens whose KV is in block_table, or will be after the steps in flight.
        max_total_tokens: length that ends it, prompt included.
        block_table: blocks in order; may reach beyond token_ids. Change it through the methods.
        block_row: [at least len(block_table)] int32, block_table again, for copying into a batch. What it holds never
            changes but by growing: where the table does, another array replaces it.
        draw_record: how its tokens are drawn, for the device; None before the first draw.
        num_hashed_blocks: leading blocks that were offered to the prefix cache.
        pending_copy: to be done before this sequence's first step; it holds a reference on the source.
        preempted: in the queue to be computed again.
    """

    __slots__ = (
        "block_hashes",
        "block_row",
        "block_table",
        "draw_record",
        "index",
        "lane",
        "max_total_tokens",
        "num_computed_tokens",
        "num_hashed_blocks",
        "num_in_flight",
        "num_pending",
        "num_prompt_tokens",
        "order",
        "pending_copy",
        "pending_row",
        "preempted",
        "request",
        "seed",
        "status",
        "token_ids",
        "_rules",
    )

    def __init__(self, request: LiveRequest, index: int, token_ids: list[int], max_total_tokens: int) -> None:
        self.request = request
        self.index = index
        self.token_ids = token_ids
        self._rules: list[Rule] | None = None
        self.draw_record: bytes | None = None
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_total_tokens = max_total_tokens
        self.seed = wrap_seed((request.params.seed or 0) + index)
        self.num_computed_tokens = 0
        self.num_pending = 0
        self.pending_row = 0
        self.num_in_flight = 0
        self.lane: enum.Enum | None = None
        self.block_table: list[int] = []
        self.block_row = np.zeros(0, dtype=np.int32)
        self.block_hashes: list[bytes] = []
        self.num_hashed_blocks = 0
        self.pending_copy: BlockCopy | None = None
        self.preempted = False
        self.status = SequenceStatus.WAITING
        self.order = (request.priority, request.arrival, index)

    @property
    def num_tokens(self) -> int:
        """Known and pending ones."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def rules(self) -> list[Rule]:
        """The rules of its draws; made with the first draw, and told every token from then on."""
        if self._rules is None:
            outputs = self.token_ids[self.num_prompt_tokens :]
            self._rules = self.request.make_rules(outputs)
        return self._rules

    def append(self, token_id: int) -> None:
        """A token is known; its rules, if there are any by now, have been told."""
        self.token_ids.append(token_id)

    def tell(self, token_id: int) -> bool:
        """Tell its rules of a token that was drawn; returns whether nothing may follow it."""
        rules = self._rules
        if not rules:
            return False
        for rule in rules:
            rule.told(token_id)
        return rules[0].ended if len(rules) == 1 else any([rule.ended for rule in rules])

    def extend_blocks(self, blocks: list[int]) -> None:
        """Append to the block table."""
        start, end = len(self.block_table), len(self.block_table) + len(blocks)
        if end > len(self.block_row):
            row = np.zeros(max(end, 2 * start), dtype=np.int32)
            row[:start] = self.block_row[:start]
            self.block_row = row
        self.block_row[start:end] = blocks
        self.block_table += blocks

    def replace_block(self, position: int, block: int) -> int:
        """Put ``block`` at this place of the block table; returns the one that was there."""
        old = self.block_table[position]
        self.block_table[position] = block
        self.block_row = self.block_row.copy()
        self.block_row[position] = block
        return old

    def pop_block(self) -> int:
        self.block_row = self.block_row.copy()
        return self.block_table.pop()

    def take_blocks(self) -> list[int]:
        """Empty the block table; returns what it held."""
        blocks, self.block_table = self.block_table, []
        self.block_row = np.zeros(0, dtype=np.int32)
        self.num_computed_tokens = 0
        self.num_hashed_blocks = 0
        return blocks

    def update_hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all full blocks of token_ids; only new ones are computed."""
        known = len(self.block_hashes)
        if len(self.token_ids) // block_size > known:
            parent = self.block_hashes[-1] if known else salted(self.request.params.cache_salt)
            self.block_hashes += hash_blocks(self.token_ids[known * block_size :], block_size, parent)
        return self.block_hashes


class LiveRequest:
    """A request from add() or reserve() until its last completion ends or release().

    Attributes:
        arrival: rank among the engine's requests, from 0.
        sequences: one per index; the first one computes the prompt for all. None once all have ended, and no step in
            flight computes any.
        end_token_ids: end-of-sequence and stop token ids, masked before min_tokens.
        prompt_array: prompt_token_ids as int32, if its draws look at them; else empty.
        forked: every sequence runs on its own.
        grammar: what its outputs follow, once it is compiled.
        has_rules: its draws follow rules, and so depend on the tokens before them, but its steps do not; see rules.py.
        has_places: its unfinished sequences are counted against max_num_seqs.
        num_cached_tokens: found in the prefix cache when blocks were first allocated.
        scores: log-probabilities of its prompt tokens, as far as they are known; see PromptScores. None: not asked for,
            or told already.
        num_alone_steps: steps that draw for it and compute nothing else, still to come.
        queued_at, scheduled_at: s on the engine's clock: add() or start_prefill(), and the first step.
        started_at, joined_at: the same for start_decode(). All are None again once reported.
        first_token_at: s on the engine's clock; None until this engine has computed its prompt.
    """

    __slots__ = (
        "arrival",
        "end_token_ids",
        "first_token_at",
        "forked",
        "grammar",
        "has_places",
        "has_rules",
        "joined_at",
        "num_alone_steps",
        "num_cached_tokens",
        "prompt_array",
        "queued_at",
        "request",
        "scheduled_at",
        "scores",
        "sequences",
        "started_at",
        "_has_grammar",
    )

    def __init__(
        self,
        request: EngineRequest,
        arrival: int,
        max_total_tokens: int,
        end_token_ids: tuple[int, ...],
        grammar: Future[Grammar] | None = None,
    ) -> None:
        self.request = request
        self.end_token_ids = end_token_ids
        self.grammar = grammar
        self._has_grammar = grammar is None
        self.has_rules = bool(self.make_rules([]))
        remembered = request.prompt_token_ids if has_penalty(request.params) else ()
        self.prompt_array = np.array(remembered, dtype=np.int32)
        self.arrival = arrival
        token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.sequences = [Sequence(self, index, token_ids, max_total_tokens) for index in request.indices]
        self.forked = False
        self.has_places = False
        self.num_cached_tokens: int | None = None
        num_top = request.params.prompt_logprobs
        self.scores: ScoreWords | None = None
        if num_top is not None:
            self.scores = np.zeros((len(request.prompt_token_ids) - 1, num_words(num_top)), dtype=np.int32)
        self.num_alone_steps = ALONE_STEPS if request.alone else 0
        self.queued_at: float | None = None
        self.scheduled_at: float | None = None
        self.started_at: float | None = None
        self.joined_at: float | None = None
        self.first_token_at: float | None = None

    def make_rules(self, output_token_ids: list[int]) -> list[Rule]:
        """New rules for a sequence that has these outputs."""
        return make_rules(History(self.params, output_token_ids, self.end_token_ids, self.grammar))

    def let_go(self) -> None:
        """Forget the sequences if all have ended: they know the request, too, and would wait with their grammars'
        states for the garbage collector, which comes rarely."""
        if not self.is_live and not any(s.num_in_flight for s in self.sequences):
            self.sequences = []

    def num_scores_between(self, start: int, end: int) -> int:
        """How many tokens of these positions a prompt token follows that is to be scored."""
        return 0 if self.scores is None else max(0, min(end, len(self.scores)) - start)

    def take_scores(self) -> PromptScores | None:
        """What has become of ``scores``, once."""
        scores, self.scores = self.scores, None
        if scores is None:
            return None
        return PromptScores(self.params.prompt_logprobs or 0, scores.astype("<i4").tobytes())

    def note_scheduled(self, now: float) -> None:
        """A step computes some of it; only the first one counts."""
        if self.queued_at is not None and self.scheduled_at is None:
            self.scheduled_at = now
        if self.started_at is not None and self.joined_at is None:
            self.joined_at = now

    @property
    def may_draw(self) -> bool:
        """False while its grammar is being compiled, and for ever if there is none: see refusal."""
        if not self._has_grammar:  # a lock, in each step
            self._has_grammar = self.grammar is None or (self.grammar.done() and self.grammar.exception() is None)
        return self._has_grammar

    @property
    def refusal(self) -> BaseException | None:
        """Why there is no such grammar, if that is known."""
        return self.grammar.exception() if self.grammar is not None and self.grammar.done() else None

    @property
    def key(self) -> Hashable:
        return self.request.key

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.request.prompt_token_ids

    @property
    def prefill_only(self) -> bool:
        return self.request.prefill_only

    @property
    def lead(self) -> Sequence:
        """The sequence that computes the prompt."""
        return self.sequences[0]

    @property
    def is_live(self) -> bool:
        """Whether a completion of it has not ended."""
        return any(s.status is not SequenceStatus.FINISHED for s in self.sequences)

    @property
    def num_places(self) -> int:
        """Sequences of it that count against max_num_seqs while it has_places."""
        return sum(s.status not in (SequenceStatus.FINISHED, SequenceStatus.HELD) for s in self.sequences)
