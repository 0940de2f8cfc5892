"""Fills the masks of a step's draws on the host, once the tokens before them are known.

Grammars are told of those tokens first, by several threads at once; then their masks are filled on a thread of their
own, while the engine's thread books the step. Between the two nothing but this may touch the grammars' matchers.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Rows
from queue import SimpleQueue
from typing import NamedTuple

import llguidance
import numpy as np
import torch

from pdray.engine.grammar.matcher import Fill, GrammarError, GrammarMatcher, Words, take_all
from pdray.engine.grammar.spelling import PLAIN
from pdray.engine.schedule.bookkeeping import GOES_ON, find_stop
from pdray.engine.schedule.masks import NOTHING_LEFT, GrammarRule
from pdray.engine.schedule.plan import Draw, SampledRow, StepPlan
from pdray.engine.schedule.sequence import Sequence, SequenceStatus
from pdray.engine.step.mask_buffer import MaskBuffer
from pdray.kernels.sampling.mask import num_mask_words

MAX_THREADS = 4  # more only wake each other: on a host of 16 cores 12 walk for 64 outputs no faster than one
FEW = 8  # outputs: to walk for so many takes less time than to wake another thread


Job = Callable[[], None]


class Filling(NamedTuple):
    """Masks that are being filled.

    Attributes:
        draws: whose masks are filled, by place. matchers: likewise, of those that follow a grammar.
        rows: likewise, of the buffer's ``words``.
        failures: see MaskFiller.fill().
        is_beside: whether another thread walks the vocabulary.
    """

    draws: list[Draw]
    rows: list[int]
    masks: MaskBuffer
    matchers: dict[int, GrammarMatcher]
    failures: dict[Hashable, str]
    fill: Fill
    is_beside: bool


class MaskFiller:
    """For the engine's thread.

    Args:
        eos_token_ids: a token that ends a completion is no part of its text.
        num_threads: that walk grammars beside the caller; fewer than 2: the caller does it by itself.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Rows[int], num_threads: int) -> None:
        self._eos_token_ids = eos_token_ids
        self._last_word, self._last_bits = vocab_size // 32, np.int32((1 << vocab_size % 32) - 1)
        self._everything = np.full(num_mask_words(vocab_size), -1, dtype=np.int32)
        self._everything[self._last_word] = self._last_bits
        self._executor = llguidance.LLExecutor(num_threads) if num_threads > 1 else None
        self._expected: tuple[StepPlan, MaskBuffer] | None = None
        self._filling: Filling | None = None
        self._takers: dict[Sequence, GrammarMatcher] = {}  # by sequence of the step to be told of, its rule's taker
        self._thread = None if self._executor is None else _Thread()

    def expect(self, plan: StepPlan, masks: MaskBuffer) -> None:
        """A step was launched whose masks fill() is to fill next, in this buffer."""
        self._expected = plan, masks

    def take(self, plan: StepPlan, rows: Rows[SampledRow]) -> None:
        """Tell the grammars what a step has drawn, before it is booked; their rules will be told the same.

        Then all that the grammars of the step behind it need is known, and if threads fill masks, they begin.
        """
        if self._executor is None:
            return
        matchers, token_ids, must_be_told = list[GrammarMatcher](), list[int](), False
        known, self._takers = self._takers, {}
        finished = SequenceStatus.FINISHED
        for (sequence, _, _), (token_id, _) in zip(plan.draws, rows, strict=True):
            live = sequence.request
            if live.grammar is None or sequence.status is finished:
                continue
            if token_id in live.end_token_ids and find_stop(live.params, self._eos_token_ids, token_id) is not GOES_ON:
                continue
            matcher = known.get(sequence)
            if matcher is None or matcher.error:
                if (matcher := _rule(sequence).taker) is None:
                    must_be_told = True
                    continue
                known[sequence] = matcher
            matchers.append(matcher)
            token_ids.append(token_id)
        take_all(matchers, token_ids)
        if self._expected is not None and not must_be_told:
            self._begin(*self._expected, known)

    def _begin(self, plan: StepPlan, masks: MaskBuffer, known: Mapping[Sequence, GrammarMatcher]) -> None:
        draws, rows, row = list[Draw](), list[int](), -1
        kept, takers, finished = masks.kept, self._takers, SequenceStatus.FINISHED
        matchers: dict[int, GrammarMatcher] = {}
        failures: dict[Hashable, str] = {}
        for draw in plan.draws:
            sequence = draw.sequence
            live = sequence.request
            if not live.has_rules:
                continue
            row += 1
            if live.grammar is not None and sequence.status is not finished:
                matcher = known.get(sequence)
                if matcher is not None:
                    takers[sequence] = matcher
                else:
                    try:
                        matcher = _rule(sequence).follower
                    except GrammarError as error:
                        failures[live.key] = str(error)
                if matcher is not None:
                    same = matcher.same_mask
                    if same is not None and same is kept[row]:
                        continue
                    matchers[len(draws)] = matcher
            draws.append(draw)
            rows.append(row)
        fill = Fill.of(list(matchers.values()), masks.host, self._executor, list(matchers))
        is_beside = self._thread is not None and len(fill.walked) > FEW
        self._expected, self._filling = None, Filling(draws, rows, masks, matchers, failures, fill, is_beside)
        if self._thread is not None and is_beside:
            self._thread.start(fill.run)

    def fill(self) -> dict[Hashable, str]:
        """Masks of those of the expected plan's draws that have any, in order. All tokens before them are booked.

        Returns:
            Requests that cannot go on, with the reason. What is drawn for them means nothing.
        """
        if self._filling is None:
            assert self._expected is not None, "no step waits for masks"
            self._begin(*self._expected, {})
        assert self._filling is not None
        filling, self._filling = self._filling, None
        draws, rows, masks, matchers, failures, fill, is_beside = filling
        words = fill.words
        if len(matchers) < len(draws):
            words[[i for i in range(len(draws)) if i not in matchers]] = self._everything
        if not is_beside:
            fill.run()
        fill.derive()
        if self._thread is not None and is_beside:
            self._thread.wait()
        fill.finish()
        settled = self._settled(filling)
        changes: list[tuple[int, object | None]] = []
        for i, (draw, row) in enumerate(zip(draws, rows, strict=True)):
            matcher = matchers.get(i)
            if i in settled:
                changes.append((row, None if matcher is None else matcher.same_mask))
                continue
            changes.append((row, None))
            if draw.sequence.status is SequenceStatus.FINISHED:
                continue
            reason = (matcher.error if matcher is not None else "") or self._narrow(draw, words[i])
            if reason:
                failures.setdefault(draw.sequence.request.key, reason)
        masks.change(changes)
        return failures

    def _settled(self, filling: Filling) -> set[int]:
        """Masks that no rule narrows: of outputs that follow a grammar and nothing else, and cannot end here."""
        may_end = (filling.fill.words[: len(filling.draws), self._last_word] & ~self._last_bits).tolist()
        settled, spelled, spelling = set(), [], None
        for i, matcher in filling.matchers.items():
            sequence = filling.draws[i].sequence
            if matcher.error or may_end[i] or len(sequence.rules) > 1 or _rule(sequence).taker is None:
                continue
            if matcher.spelling is None or matcher.is_within:
                settled.add(i)
            elif matcher.spelling_state == PLAIN:
                spelled.append(i)
                spelling = matcher.spelling  # the vocabulary's
        if spelling is not None:
            breaks = spelling.breaks(filling.fill.words, spelled)
            settled.update(i for i, is_broken in zip(spelled, breaks.tolist(), strict=True) if not is_broken)
        return settled

    def _narrow(self, draw: Draw, words: Words) -> str:
        """Let every rule have its word; returns why nothing is left, if so."""
        for rule in draw.sequence.rules:
            rule.narrow(words, draw.position)
        last = self._last_word
        return "" if words[last] & self._last_bits or words[:last].any() else NOTHING_LEFT


def _rule(sequence: Sequence) -> GrammarRule:
    """The one that follows the request's grammar."""
    rule = sequence.rules[0]
    assert isinstance(rule, GrammarRule), "a grammar's rule is asked first"
    return rule


def num_fill_threads(device: torch.device) -> int:
    """On CUDA the host has cores to spare; elsewhere they compute."""
    return min(MAX_THREADS, (os.cpu_count() or 1) - 2) if device.type == "cuda" else 1


class _Thread:
    """Does one job at a time, beside the caller."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._results: SimpleQueue[BaseException | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs, self._results), name="pdray-masks", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def start(self, job: Job) -> None:
        self._jobs.put(job)

    def wait(self) -> None:
        """Until the job that was started is done; raises what it has raised."""
        if (error := self._results.get()) is not None:
            raise error


def _work(jobs: SimpleQueue[Job | None], results: SimpleQueue[BaseException | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except BaseException as error:
            results.put(error)
        else:
            results.put(None)
        del job
