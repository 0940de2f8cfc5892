"""Questions to Ray and to actors, with a deadline; blocking ones are asked off the event loop.

Ray's own calls (its tables of nodes, actors and placement groups, the creation and the end of an actor) wait for its
GCS, for a minute and more where that does not answer. An event loop that waited with them would miss its heartbeats.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import ray
from ray._private.state import actors as actor_table

from pdray.background import start_thread
from pdray.errors import PdrayError

ASK_TIMEOUT_S = 5.0
MIN_LAG_S = 0.1  # what an event loop is late anyhow

T = TypeVar("T")


class NoAnswerError(PdrayError):
    """Ray did not answer a question in time."""


async def ask(question: Callable[[], T], *, what: str, timeout_s: float = ASK_TIMEOUT_S) -> T:
    """Answer a blocking question on a thread of its own, so that one that hangs does not hold up others.

    Raises:
        NoAnswerError: there is none within timeout_s; the thread is left to itself. What the question raises.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not answer.done():
            setter(value)

    def tell(setter: Callable[[Any], None], value: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, setter, value)

    start_thread(
        f"ask-{what}", lambda: tell(answer.set_result, question()), lambda error: tell(answer.set_exception, error)
    )
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError:
        raise NoAnswerError(f"Ray has not answered within {timeout_s:g} s: {what}") from None


async def within(awaitable: Awaitable[T], timeout_s: float) -> T:
    """Its result. Time in which this event loop stood still, or the whole process, does not count.

    Raises:
        TimeoutError: there is none after so long. What the awaitable raises.
    """
    loop = asyncio.get_running_loop()
    result = asyncio.ensure_future(awaitable)
    try:
        while True:
            began = loop.time()
            done, _ = await asyncio.wait({result}, timeout=timeout_s)
            if done:
                return result.result()
            lag = loop.time() - began - timeout_s
            if lag < MIN_LAG_S:
                raise TimeoutError
            timeout_s = min(timeout_s, lag)
    finally:
        result.cancel()


class ActorProcess(NamedTuple):
    """The process that an actor runs in, by Ray's table. pid 0: it has none yet, or never had.

    Attributes:
        state: ALIVE, RESTARTING, DEAD, PENDING_CREATION or DEPENDENCIES_UNREADY.
    """

    state: str
    pid: int
    node_id: str


async def find_process(actor_id: str) -> ActorProcess:
    """The process in which an actor runs, or ran last.

    Raises:
        NoAnswerError: Ray's GCS does not say.
    """
    row = await ask(partial(actor_table, actor_id), what="where an actor runs")
    if not row:
        return ActorProcess("DEAD", 0, "")
    return ActorProcess(row["State"], row["Pid"], row["Address"]["NodeID"])


async def node_is_alive(node_id: str) -> bool:
    """Whether Ray's GCS counts a node as alive. Raises NoAnswerError."""
    nodes = await ask(ray.nodes, what="which nodes are alive")
    return any(node["NodeID"] == node_id and node["Alive"] for node in nodes)


def own_process() -> ActorProcess:
    """This process, in the form in which find_process() describes an actor's."""
    return ActorProcess("ALIVE", os.getpid(), ray.get_runtime_context().get_node_id())


def cause_of(error: BaseException) -> BaseException:
    """The exception that an actor raised: Ray wraps it in its traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def first_line(error: BaseException) -> str:
    """The cause's own words."""
    cause = cause_of(error)
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
