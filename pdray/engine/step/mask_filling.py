"""Fills the masks of a step's draws on the host, once the tokens before them are known."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import NamedTuple

import llguidance
import numpy as np
import torch

from pdray.engine.grammar.matcher import GrammarError, GrammarMatcher, Words, fill_all, num_words
from pdray.engine.schedule.masks import NOTHING_LEFT, GrammarRule, no_words
from pdray.engine.schedule.plan import Draw
from pdray.engine.schedule.sequence import Sequence, SequenceStatus
from pdray.kernels.sampling.mask import TokenMasks

MAX_THREADS = 8


class FilledMasks(NamedTuple):
    """Attributes:
    masks: of the draws whose sequence goes on; None if there are none.
    failures: requests that cannot, with the reason. What is drawn for them means nothing.
    """

    masks: TokenMasks | None
    failures: dict[Hashable, str]


class MaskFiller:
    """For the engine's thread.

    Args:
        device: of the masks. On CUDA, grammars are spread over threads: the host has cores to spare there.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._executor: llguidance.LLExecutor | None = None
        if device.type == "cuda":
            num_threads = min(MAX_THREADS, (os.cpu_count() or 1) // 2)
            self._executor = llguidance.LLExecutor(num_threads) if num_threads > 1 else None

    def fill(self, draws: list[Draw]) -> FilledMasks:
        """Masks of a plan's draws, in order. Their sequences' rules have heard of all tokens."""
        rows = [
            (row, draw)
            for row, draw in enumerate(draws)
            if draw.sequence.request.has_mask and draw.sequence.status is not SequenceStatus.FINISHED
        ]
        if not rows:
            return FilledMasks(None, {})
        words = no_words(len(rows), self._vocab_size)
        failures: dict[Hashable, str] = {}
        matchers = self._matchers([draw.sequence for _, draw in rows], failures)
        fill_all(list(matchers.values()), words, self._executor, list(matchers))
        for i, (_, draw) in enumerate(rows):
            matcher = matchers.get(i)
            reason = (matcher.error if matcher is not None else "") or self._narrow(draw, words[i])
            if reason:
                failures.setdefault(draw.sequence.request.key, reason)
        return FilledMasks(self._to_device([row for row, _ in rows], words), failures)

    @staticmethod
    def _matchers(sequences: list[Sequence], failures: dict[Hashable, str]) -> dict[int, GrammarMatcher]:
        """Those of sequences that follow a grammar, by their place in the list."""
        matchers = {}
        for i, sequence in enumerate(sequences):
            for rule in sequence.rules:
                if isinstance(rule, GrammarRule):
                    try:
                        matchers[i] = rule.matcher
                    except GrammarError as error:
                        failures[sequence.request.key] = str(error)
        return matchers

    def _narrow(self, draw: Draw, words: Words) -> str:
        """Let every rule have its word; returns why nothing is left, if so."""
        for rule in draw.sequence.rules:
            rule.narrow(words, draw.position)
        last, bits = divmod(self._vocab_size, 32)
        has_more = bool(bits) and bool(words[last] & np.int32((1 << bits) - 1))
        return "" if has_more or words[:last].any() else NOTHING_LEFT

    def _to_device(self, rows: list[int], words: Words) -> TokenMasks:
        index, packed = torch.tensor(rows), torch.from_numpy(words[:, : num_words(self._vocab_size)])
        if self._device.type == "cpu":
            return TokenMasks(index, packed)
        # Pinned memory that torch keeps until the copy has run.
        return TokenMasks(*(part.pin_memory().to(self._device, non_blocking=True) for part in (index, packed)))
