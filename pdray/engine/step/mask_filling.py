"""Fills the masks of a step's draws on the host, once the tokens before them are known."""

from __future__ import annotations

import os
from collections.abc import Hashable

import llguidance
import numpy as np
import torch

from pdray.engine.grammar.matcher import GrammarError, GrammarMatcher, Words, fill_all
from pdray.engine.schedule.masks import NOTHING_LEFT, GrammarRule
from pdray.engine.schedule.plan import Draw
from pdray.engine.schedule.sequence import Sequence, SequenceStatus
from pdray.kernels.sampling.mask import num_mask_words

MAX_THREADS = 8


class MaskFiller:
    """For the engine's thread.

    Args:
        device: of the masks. On CUDA, grammars are spread over threads: the host has cores to spare there.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._last_word, self._last_bits = vocab_size // 32, np.int32((1 << vocab_size % 32) - 1)
        self._everything = np.full(num_mask_words(vocab_size), -1, dtype=np.int32)
        self._everything[self._last_word] = self._last_bits
        self._executor: llguidance.LLExecutor | None = None
        if device.type == "cuda":
            num_threads = min(MAX_THREADS, (os.cpu_count() or 1) // 2)
            self._executor = llguidance.LLExecutor(num_threads) if num_threads > 1 else None

    def fill(self, draws: list[Draw], words: Words) -> dict[Hashable, str]:
        """Masks of those of a plan's draws that have any, in order. Their sequences' rules have heard of all tokens.

        Args:
            words: [at least their number, num_mask_words(vocab_size)].

        Returns:
            Requests that cannot go on, with the reason. What is drawn for them means nothing.
        """
        masked = [draw for draw in draws if draw.sequence.request.has_rules]
        rows = {i: draw for i, draw in enumerate(masked) if draw.sequence.status is not SequenceStatus.FINISHED}
        failures: dict[Hashable, str] = {}
        matchers = self._matchers({i: draw.sequence for i, draw in rows.items()}, failures)
        words[[i for i in rows if i not in matchers]] = self._everything
        fill_all(list(matchers.values()), words, self._executor, list(matchers))
        for i, draw in rows.items():
            matcher = matchers.get(i)
            reason = (matcher.error if matcher is not None else "") or self._narrow(draw, words[i])
            if reason:
                failures.setdefault(draw.sequence.request.key, reason)
        return failures

    @staticmethod
    def _matchers(sequences: dict[int, Sequence], failures: dict[Hashable, str]) -> dict[int, GrammarMatcher]:
        """Those of sequences that follow a grammar, by their masks' places."""
        matchers = {}
        for i, sequence in sequences.items():
            for rule in sequence.rules:
                if isinstance(rule, GrammarRule) and not rule.is_thinking:
                    try:
                        matchers[i] = rule.matcher
                    except GrammarError as error:
                        failures[sequence.request.key] = str(error)
        return matchers

    def _narrow(self, draw: Draw, words: Words) -> str:
        """Let every rule have its word; returns why nothing is left, if so."""
        for rule in draw.sequence.rules:
            rule.narrow(words, draw.position)
        last = self._last_word
        return "" if words[last] & self._last_bits or words[:last].any() else NOTHING_LEFT
