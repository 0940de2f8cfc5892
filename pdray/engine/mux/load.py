"""What prompts and decodes wait for, as the controller is told it."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple

from pdray.engine.schedule.order import MAX_COUNTED, is_free_for
from pdray.engine.schedule.plan import LaneName
from pdray.engine.schedule.scheduler import Scheduler
from pdray.engine.schedule.sequence import Sequence

FIRST_LENGTH = 256.0  # tokens of a stream, while none has ended
LENGTH_WEIGHT = 0.05  # of the newest in the mean
LEAST_LEFT = 16  # tokens that a stream is expected to have before it, unless it must end sooner


class Wait(NamedTuple):
    """A prompt that is not computed yet.

    Attributes:
        num_tokens: that are left of it. waited_s: so far. all_tokens: of the whole prompt.
        is_stream: it has had its first token, and was preempted.
    """

    num_tokens: int
    waited_s: float
    all_tokens: int
    is_stream: bool = False


class Stream(NamedTuple):
    """A sequence that decodes.

    Attributes:
        age_s: since its first token. num_steps: tokens that came after that. num_left: that are expected to come.
    """

    age_s: float
    num_steps: int
    num_left: int


class Lengths:
    """How many tokens streams may be expected to have, by those that have ended: max_tokens is often far beyond."""

    def __init__(self) -> None:
        self._mean = FIRST_LENGTH

    def note(self, num_steps: int) -> None:
        """A stream has ended after so many tokens behind its first."""
        self._mean += LENGTH_WEIGHT * (num_steps - self._mean)

    def left(self, num_steps: int, most: int) -> int:
        """Tokens to come of a stream that has had so many, of which no more than ``most`` may come."""
        return min(most, max(LEAST_LEFT, round(self._mean) - num_steps))


class Load(NamedTuple):
    """What waits.

    Attributes:
        num_decodes: sequences that decode.
        prompts: in the order in which they are computed; of many, the first.
        num_begun: of them, which come first.
        context: tokens of the first prompt that are computed.
        streams: those of the sequences that decode whose first token came from this engine.
    """

    num_decodes: int
    prompts: list[Wait]
    context: int
    streams: Rows[Stream] = ()
    num_begun: int = 0

    @property
    def num_queued(self) -> int:
        return sum(wait.num_tokens for wait in self.prompts)


def wait_of(sequence: Sequence, now: float) -> Wait:
    """Of a sequence whose prompt is not computed yet; one that was preempted has waited since its first token."""
    request = sequence.request
    waited_s = now - (request.queued_at or request.first_token_at or now)
    is_stream = request.first_token_at is not None
    return Wait(sequence.num_uncomputed_tokens, waited_s, len(sequence.token_ids), is_stream)


def num_steps_of(sequence: Sequence) -> int:
    """Tokens behind the first one that came from this engine."""
    request = sequence.request.request
    return len(sequence.token_ids) - sequence.num_prompt_tokens - len(request.output_token_ids) - 1


def measure_load(scheduler: Scheduler, now: float, lengths: Lengths) -> Load | None:
    """The load, under the engine's lock; None unless prompts and decodes both wait.

    Sequences whose prompt's last piece is in flight are on neither side.
    """
    running = scheduler.running
    # num_uncomputed_tokens, in a third of the time: this is asked before every step.
    begun = [s for s in running if len(s.token_ids) + s.num_pending - s.num_computed_tokens > 1]
    prompts = [*begun, *scheduler.waiting[:MAX_COUNTED]]
    if not prompts or len(begun) == len(running):
        return None
    in_prompt = {id(sequence) for sequence in begun}
    decodes = [s for s in running if id(s) not in in_prompt and is_free_for(s, LaneName.MAIN)]
    if not decodes:
        return None
    waits = [wait_of(s, now) for s in prompts]
    streams = []
    for s in decodes:
        if (began_at := s.request.first_token_at) is not None:
            num_steps = num_steps_of(s)
            num_left = lengths.left(num_steps, s.max_total_tokens - len(s.token_ids))
            streams.append(Stream(now - began_at, num_steps, num_left))
    return Load(len(decodes), waits, prompts[0].num_computed_tokens, streams, len(begun))
