"""Rules that requests ask for: grammars, and what else narrows the vocabulary."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from pdray.engine.grammar.matcher import Grammar, GrammarError, GrammarMatcher, Words
from pdray.engine.schedule.rule import History, Rule, set_bits
from pdray.engine.schedule.thoughts import Thoughts

NOTHING_LEFT = "no token of the vocabulary satisfies all that the request asks of the next one"


class GrammarRule(Rule):
    """Follows a grammar, which has been compiled by the first draw. The output ends where nothing may follow.

    With structured_outputs_after_thinking an output may begin with thoughts, and follows the grammar behind them.
    """

    def __init__(self, grammar: Future[Grammar], history: History) -> None:
        self._grammar, self._history = grammar, history
        self._matcher: GrammarMatcher | None = None
        self._failure = ""
        thinking = history.params.thinking if history.params.structured_outputs_after_thinking else None
        self._begin_thoughts = None if thinking is None or thinking.num_open is not None else thinking.begin
        self._thoughts = None if thinking is None else Thoughts(thinking)
        self._earlier = [token_id for token_id in history.output_token_ids if self._is_answer(token_id)]

    def _is_answer(self, token_id: int) -> bool:
        """Whether the output's next token is none of its thoughts."""
        if self._thoughts is None:
            return True
        self._thoughts.take(token_id)
        if self._begin_thoughts is not None and not self._thoughts.is_open:
            self._thoughts = None  # it has begun without any
            return True
        self._begin_thoughts = None
        if self._thoughts.is_over:
            self._thoughts = None
        return False

    @property
    def is_thinking(self) -> bool:
        """Whether the next token is one of the thoughts, which no grammar holds for."""
        return self._thoughts is not None and self._thoughts.is_open

    @property
    def matcher(self) -> GrammarMatcher:
        """Where the answer is.

        Raises:
            GrammarError: it cannot go on.
        """
        if self._matcher is None and not self._failure:
            try:
                self._matcher = self._grammar.result().matcher(self._earlier)
            except GrammarError as error:
                self._failure = str(error)
        if self._failure or self._matcher is None:
            raise GrammarError(self._failure)
        return self._matcher

    @property
    def follower(self) -> GrammarMatcher | None:
        """The matcher that says which token may come next; None where that is one of the thoughts.

        Raises:
            GrammarError: see matcher.
        """
        return None if self.is_thinking else self.matcher

    @property
    def taker(self) -> GrammarMatcher | None:
        """The matcher, if the next token is one that told() will hand on to it, and no thought."""
        return None if self._failure or self._thoughts is not None else self._matcher

    def told(self, token_id: int) -> None:
        """See Rule. A token that the grammar does not take (all logits were -inf) ends the request at its next draw."""
        matcher = self.taker
        if matcher is None and not self._is_answer(token_id):
            return
        try:
            (matcher or self.matcher).take(token_id)
        except GrammarError as error:
            self._failure = str(error)

    @property
    def ended(self) -> bool:
        """See Rule."""
        return self._matcher is not None and not self._failure and self._matcher.ended

    def narrow(self, words: Words, position: int) -> None:
        """See Rule; words hold what the matcher allows. Where the text may end, so may the output."""
        params = self._history.params
        if self.is_thinking:  # an end here would leave an answer that does not match
            thinking = params.thinking
            set_bits(words, [i for i in self._history.end_token_ids if thinking is None or i != thinking.end], False)
            return
        if self._matcher is not None:
            self._matcher.narrow(words)
        if self._begin_thoughts is not None:
            set_bits(words, [self._begin_thoughts], True)
        grammar = self._grammar.result()
        end = grammar.vocab_size
        if not words[end // 32] >> (end % 32) & 1:
            return
        set_bits(words, [end], False)
        ends = params.stop_token_ids if params.ignore_eos and words.any() else self._history.end_token_ids
        set_bits(words, [i for i in ends if i in grammar.special], True)

    @staticmethod
    def make(history: History) -> Rule | None:
        """None without structured outputs."""
        return None if history.grammar is None else GrammarRule(history.grammar, history)


class AllowedTokens(Rule):
    """Nothing but the request's allowed_token_ids."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._token_ids = token_ids
        self._words: Words | None = None

    def narrow(self, words: Words, position: int) -> None:
        """See Rule."""
        if self._words is None:
            self._words = np.zeros_like(words)
            set_bits(self._words, self._token_ids, True)
        words &= self._words

    @staticmethod
    def make(history: History) -> Rule | None:
        """None if any are allowed."""
        allowed = history.params.allowed_token_ids
        return None if allowed is None else AllowedTokens(allowed)


class BadWords(Rule):
    """Bans the token that would complete one of the words."""

    def __init__(self, history: History) -> None:
        self._words_token_ids = history.params.bad_words_token_ids
        self._reach = max(len(token_ids) for token_ids in self._words_token_ids) - 1
        self._last = tuple(history.output_token_ids[-self._reach :]) if self._reach else ()

    def told(self, token_id: int) -> None:
        """See Rule."""
        self._last = (*self._last, token_id)[-self._reach :] if self._reach else ()

    def narrow(self, words: Words, position: int) -> None:
        """See Rule."""
        for *before, last in self._words_token_ids:
            if not before or self._last[-len(before) :] == tuple(before):
                set_bits(words, [last], False)

    @staticmethod
    def make(history: History) -> Rule | None:
        """None without bad words."""
        return BadWords(history) if history.params.bad_words_token_ids else None
