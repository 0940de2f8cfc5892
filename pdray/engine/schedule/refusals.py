"""Ends requests that cannot go on, where nothing but the request itself is the reason."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from pdray.engine.request import RequestUpdate
from pdray.engine.schedule.sequence import LiveRequest, SequenceStatus
from pdray.errors import InvalidRequestError

if TYPE_CHECKING:
    from pdray.engine.schedule.scheduler import Scheduler


def refuse(scheduler: Scheduler, key: Hashable, error: BaseException) -> RequestUpdate:
    """End a request; returns the news of it. Under the engine's lock."""
    scheduler.release(key)
    param = error.param if isinstance(error, InvalidRequestError) else None
    return RequestUpdate(key, finished=True, failure=str(error), suspects=(key,), param=param)


def grammar_compiled(scheduler: Scheduler, live: LiveRequest) -> None:
    """A request's grammar is there, or there is none: then the request ends. One that is reserved does so when it is
    started: until then somebody may be writing to its blocks. Under the engine's lock."""
    scheduler.compiling = [other for other in scheduler.compiling if not other.may_draw]
    is_reserved = live.lead.status is SequenceStatus.RESERVED
    if live.refusal is not None and not is_reserved and scheduler.requests.get(live.key) is live:
        scheduler.updates.append(refuse(scheduler, live.key, live.refusal))
