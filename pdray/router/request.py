"""A router's account of one request: its legs, its output as it grows, and every token exactly once and in order.

A first leg runs all n completions. A leg that is lost (its worker died) is replaced by one leg for each
completion that it had not finished, carrying what that completion has produced so far; positions
go on from there. Tokens of a leg that was replaced are dropped wherever they turn up.

Pure: time is passed in. Single-threaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import msgspec

from pdray.control.losses import Losses
from pdray.outputs import RequestOutput, SampledToken
from pdray.prompt_scores import PromptScores
from pdray.router.completion import GrowingCompletion
from pdray.router.leg import Leg
from pdray.sampling_params import SamplingParams
from pdray.wire.lease_messages import LegTokens
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import FirstTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_place = attrgetter("index", "position")
TIMINGS_OF_STEPS = ("prefill_queue", "prefill", "transfer_wait", "first_decode_step", "first_launch")


class Request:
    """See the module.

    Attributes:
        params: of its legs, with max_tokens; see complete_params().
        output: everything so far, but for the text of completions that go on; complete at the end, but for logprobs:
            who streams has them in deltas alone.
        legs: the live ones.
        granted: its first lease stood: it is no longer refused, but goes on or fails.
        outruns: completions ended by a stop string that their worker does not know of.
        whole: its consumer waits for the end, and no stop string has to be seen before.
        prompt_scores: what prompt_logprobs asks for, once it is known.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int,
        tokenizer: PreTrainedTokenizerBase | None,
        arrival: float,
        *,
        whole: bool = False,
    ) -> None:
        self.request_id = request_id
        self.tokenizer = tokenizer
        # A step that computes a prompt draws a token, wanted or not.
        self.params = msgspec.structs.replace(params, max_tokens=1) if params.max_tokens == 0 else params
        self.prompt_scores: PromptScores | None = None
        self.priority = priority
        self.arrival = arrival
        self.whole = whole and not params.stop
        self.completions = [GrowingCompletion(i, tokenizer, prompt_token_ids, params) for i in range(params.n)]
        self.output = RequestOutput(request_id, prompt, prompt_token_ids, [each.output for each in self.completions])
        self.legs: dict[LegKey, Leg] = {}
        self.granted = False
        self.ended = False
        self.losses = Losses()
        self.outruns: set[int] = set()
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self._finished: set[int] = set()
        self._next_attempt = 0

    # legs

    def start(self) -> Leg:
        """The first leg: all completions, from the prompt."""
        assert self._next_attempt == 0, self.request_id
        return self._open(tuple(range(self.params.n)), ())

    def replace(self, lost: Leg, *, alone: bool) -> list[Leg]:
        """A leg is lost: the legs that take its unfinished completions over, in higher attempts.

        Args:
            alone: see Leg.
        """
        if self.legs.pop(lost.key, None) is None:
            return []
        unfinished = [index for index in lost.indices if index not in self._finished]
        produced = {index: tuple(self.completions[index].output.token_ids) for index in unfinished}
        if any(produced.values()):
            legs = [self._open((index,), token_ids) for index, token_ids in produced.items()]
        else:
            legs = [self._open(tuple(unfinished), ())] if unfinished else []
        for leg in legs:
            leg.alone, leg.num_losses = alone, lost.num_losses + 1
        return legs

    def renumber(self, leg: Leg) -> None:
        """The same leg in a new attempt: what is said of the former one is not about it."""
        del self.legs[leg.key]
        leg.key = self._next_key()
        self.legs[leg.key] = leg

    def take_ended_legs(self) -> list[Leg]:
        """Legs all of whose completions have ended; they are forgotten, and their leases can be closed."""
        ended = [leg for leg in self.legs.values() if self._finished.issuperset(leg.indices)]
        for leg in ended:
            del self.legs[leg.key]
        return ended

    def take_legs(self) -> list[Leg]:
        """The request is over, whatever its completions did: the legs to close."""
        legs = list(self.legs.values())
        self.legs.clear()
        return legs

    def ended_by_worker(self, leg: Leg) -> bool:
        """Whether its worker has ended every completion of the leg by itself."""
        return all(index in self._finished and index not in self.outruns for index in leg.indices)

    def _open(self, indices: tuple[int, ...], output_token_ids: tuple[int, ...]) -> Leg:
        leg = Leg(self, self._next_key(), indices, output_token_ids)
        self.legs[leg.key] = leg
        return leg

    def _next_key(self) -> LegKey:
        key = LegKey(self.request_id, self._next_attempt)
        self._next_attempt += 1
        return key

    # what happens to it

    @property
    def done(self) -> bool:
        """Whether every completion has ended."""
        return len(self._finished) == len(self.completions)

    def begin(self, now: float, leg: Leg, num_cached_tokens: int) -> None:
        """A leg begins.

        Args:
            num_cached_tokens: found in the decode worker's prefix cache.
        """
        self.granted = True
        if self.first_token_at is None:
            timings = self.output.timings
            timings.queue = leg.asked_at - self.arrival
            timings.lease_wait = leg.lease_wait(now)
            self.output.num_cached_tokens = num_cached_tokens

    def take(self, now: float, leg: Leg, tokens: Sequence[SampledToken]) -> list[int] | None:
        """Book what is new of a live leg's tokens; repeated positions and ended completions give nothing.

        Returns:
            The completions that it has ended; None if nothing was new.
        """
        is_new, is_second, ended = False, False, []
        for token in sorted(tokens, key=_place) if len(tokens) > 1 else tokens:
            index, position = token.index, token.position
            completion = self.completions[index]
            num_tokens = len(completion.output.token_ids)
            if index in self._finished or position < num_tokens or index not in leg.indices:
                continue
            assert position == num_tokens, f"{leg.key}: position {position} after {num_tokens} tokens"
            is_new, is_second = True, is_second or position == 1
            stop = completion.take(token)
            if stop is not None or token.finish_reason is not None:
                self._finished.add(index)
                ended.append(index)
                if token.finish_reason is None:
                    self.outruns.add(index)
        if not is_new:
            return None
        self._note_times(now, is_second=is_second)
        return ended

    def _note_times(self, now: float, *, is_second: bool) -> None:
        timings = self.output.timings
        if self.first_token_at is None:
            self.first_token_at = now
            timings.ttft = now - self.arrival
        elif is_second and timings.first_gap is None:
            timings.first_gap = now - self.first_token_at
        self.last_token_at = now

    def note_prefill(self, leg: Leg, message: FirstTokens) -> None:
        """What the first token's message tells beside it."""
        if self.first_token_at is None:
            self.output.timings.prefill_queue, self.output.timings.prefill = message.prefill_queue, message.prefill
        self._note_scores(message.prompt_scores)
        self._note_cached(leg, message.num_cached_tokens)

    def note_steps(self, leg: Leg, message: LegTokens) -> None:
        """What a decode worker's message tells beside tokens; nearly always nothing."""
        if message.prefill is not None or message.first_decode_step is not None:
            timings = self.output.timings
            for name in TIMINGS_OF_STEPS:
                seconds = getattr(message, name)
                if seconds is not None and getattr(timings, name) is None:
                    setattr(timings, name, seconds)
            self._note_scores(message.prompt_scores)
        if message.num_cached_tokens is not None:
            self._note_cached(leg, message.num_cached_tokens)

    def _note_scores(self, scores: PromptScores | None) -> None:
        """Kept once: what is computed again for a replay need not be scored again."""
        if scores is not None:
            self.prompt_scores = scores
            self.params = msgspec.structs.replace(self.params, prompt_logprobs=None)

    def _note_cached(self, leg: Leg, num_cached_tokens: int) -> None:
        """Of the prompt; a leg that goes on from outputs finds those in the cache, too."""
        if not leg.output_token_ids:
            self.output.num_cached_tokens = max(self.output.num_cached_tokens, num_cached_tokens)

    def give_up(self) -> None:
        """Its consumer wants no more: completions that go on have no other reason to end."""
        for completion in self.output.outputs:
            completion.finish_reason = completion.finish_reason or "abort"

    def end(self, now: float, error: BaseException | None = None) -> None:
        """Nothing more will come."""
        self.ended = True
        for completion in self.completions:
            completion.close()
        self.output.finished = error is None
        self.output.timings.e2e = now - self.arrival
