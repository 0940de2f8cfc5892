"""What prompts and decodes wait for, as the controller is told it."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple

from pdray.engine.schedule.order import MAX_COUNTED, is_free_for
from pdray.engine.schedule.plan import LaneName
from pdray.engine.schedule.scheduler import Scheduler
from pdray.engine.schedule.sequence import Sequence


class Wait(NamedTuple):
    """A prompt that is not computed yet.

    Attributes:
        num_tokens: that are left of it. waited_s: so far. all_tokens: of the whole prompt.
    """

    num_tokens: int
    waited_s: float
    all_tokens: int


class Stream(NamedTuple):
    """A sequence that decodes.

    Attributes:
        age_s: since its first token. num_steps: tokens that came after that. num_left: tokens that may still come.
    """

    age_s: float
    num_steps: int
    num_left: int


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
    waited_s = now - (sequence.request.queued_at or sequence.request.first_token_at or now)
    return Wait(sequence.num_uncomputed_tokens, waited_s, len(sequence.token_ids))


def measure_load(scheduler: Scheduler, now: float) -> Load | None:
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
        began_at, length = s.request.first_token_at, len(s.token_ids)
        if began_at is not None:
            num_before = s.num_prompt_tokens + len(s.request.request.output_token_ids) + 1
            streams.append(Stream(now - began_at, length - num_before, s.max_total_tokens - length))
    return Load(len(decodes), waits, prompts[0].num_computed_tokens, streams, len(begun))
