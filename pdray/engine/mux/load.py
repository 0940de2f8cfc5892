"""What prompts and decodes wait for, as the controller is told it."""

from __future__ import annotations

from typing import NamedTuple

from pdray.engine.schedule.order import MAX_COUNTED, is_free_for
from pdray.engine.schedule.plan import LaneName
from pdray.engine.schedule.scheduler import Scheduler


class Wait(NamedTuple):
    """A prompt that is not computed yet.

    Attributes:
        num_tokens: that are left of it. waited_s: so far. all_tokens: of the whole prompt.
    """

    num_tokens: int
    waited_s: float
    all_tokens: int


class Load(NamedTuple):
    """What waits.

    Attributes:
        num_decodes: sequences that decode.
        prompts: in the order in which they are computed; of many, the first.
        context: tokens of the first prompt that are computed.
    """

    num_decodes: int
    prompts: list[Wait]
    context: int

    @property
    def num_queued(self) -> int:
        return sum(wait.num_tokens for wait in self.prompts)


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
    num_decodes = sum(id(s) not in in_prompt and is_free_for(s, LaneName.MAIN) for s in running)
    if not num_decodes:
        return None
    waits = [Wait(s.num_uncomputed_tokens, now - (s.request.queued_at or now), len(s.token_ids)) for s in prompts]
    return Load(num_decodes, waits, prompts[0].num_computed_tokens)
