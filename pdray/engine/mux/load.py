"""What prompts and decodes wait for, as the controller is told it."""

from __future__ import annotations

from pdray.engine.mux.controller import Load
from pdray.engine.schedule.order import is_free_for
from pdray.engine.schedule.plan import LaneName
from pdray.engine.schedule.scheduler import Scheduler


def measure_load(scheduler: Scheduler, now: float) -> Load | None:
    """The load, under the engine's lock; None unless prompts and decodes both wait.

    Sequences whose prompt's last piece is in flight are on neither side.
    """
    running = scheduler.running
    # num_uncomputed_tokens, in a third of the time: this is asked before every step.
    begun = [s for s in running if len(s.token_ids) + s.num_pending - s.num_computed_tokens > 1]
    prompts = [*begun, *scheduler.waiting]
    if not prompts or len(begun) == len(running):
        return None
    in_prompt = {id(sequence) for sequence in begun}
    decoding = [s for s in running if id(s) not in in_prompt and is_free_for(s, LaneName.MAIN)]
    if not decoding:
        return None
    oldest = min(sequence.request.queued_at or now for sequence in prompts)
    kv_tokens = sum(sequence.num_computed_tokens for sequence in decoding)
    return Load(kv_tokens, sum(sequence.num_uncomputed_tokens for sequence in prompts), now - oldest)
