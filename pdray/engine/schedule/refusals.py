"""Ends requests that cannot go on, where nothing but the request itself, or a step that computes it, is the reason."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

from pdray.engine.request import RequestUpdate
from pdray.engine.schedule.sequence import LiveRequest, SequenceStatus
from pdray.errors import InvalidRequestError, RequestFailedError, describe_error

if TYPE_CHECKING:
    from pdray.engine.schedule.plan import StepPlan
    from pdray.engine.schedule.scheduler import Scheduler

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def preparing(key: Hashable) -> Iterator[None]:
    """Around what examines a request that is not taken yet.

    Raises:
        InvalidRequestError: as it is. RequestFailedError: whatever else goes wrong there.
    """
    try:
        yield
    except InvalidRequestError:
        raise
    except Exception as error:
        logger.exception("request %r could not be prepared", key)
        raise RequestFailedError(f"the request could not be prepared: {describe_error(error)}") from error


def refuse(scheduler: Scheduler, key: Hashable, error: BaseException) -> RequestUpdate:
    """End a request; returns the news of it. Under the engine's lock."""
    scheduler.release(key)
    param = error.param if isinstance(error, InvalidRequestError) else None
    return RequestUpdate(key, finished=True, failure=str(error), suspects=(key,), param=param)


def grammar_compiled(scheduler: Scheduler, live: LiveRequest) -> None:
    """A request's grammar is there, or there is none: then the request ends. One that is reserved does so when it is
    started: until then somebody may be writing to its blocks. Under the engine's lock."""
    scheduler.compiling = [other for other in scheduler.compiling if other is not live]
    is_reserved = live.lead.status is SequenceStatus.RESERVED
    if live.refusal is not None and not is_reserved and scheduler.requests.get(live.key) is live:
        scheduler.updates.append(refuse(scheduler, live.key, live.refusal))


def give_up(scheduler: Scheduler, plan: StepPlan, error: Exception) -> list[RequestUpdate]:
    """The last plan could not be launched: end its requests; returns the news of them. Under the engine's lock.

    What it has written is in their blocks alone.
    """
    keys = plan.keys
    logger.error("a step of %d requests failed: %s", len(keys), keys, exc_info=error)
    lost = [key for key in keys if key in scheduler.requests]
    for key in lost:
        scheduler.release(key)
    scheduler.discard(plan)
    reason = describe_error(error)
    return [RequestUpdate(key, finished=True, failure=reason, suspects=tuple(keys)) for key in lost]
