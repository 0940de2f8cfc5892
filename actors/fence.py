"""The check that only one process acts as an application's Coordinator."""

from __future__ import annotations

import asyncio

import ray

from pdray.actors.questions import NoAnswerError, find_process, own_process
from pdray.errors import PdrayError

POLL_S = 0.05


class SupersededError(PdrayError):
    """Ray has started the actor again elsewhere: this process must not act for it any more."""


class Fence:
    """Asks Ray's GCS, which starts the next process of an actor, whether this is still the one it runs in.

    A Coordinator whose node was frozen, or cut off, until Ray gave it up may wake up beside its successor; it asks
    before everything that it does to a worker.
    """

    def __init__(self) -> None:
        self._actor_id = ray.get_runtime_context().get_actor_id()
        self._me = own_process()

    async def established(self) -> None:
        """Returns once the GCS names this process.

        Raises:
            SupersededError: it names another that is alive.
        """
        while True:
            try:
                await self.check()
                return
            except NoAnswerError:
                continue
            except SupersededError:
                assert self._actor_id is not None
                process = await find_process(self._actor_id)
                if process.state == "ALIVE" and process != self._me:
                    raise
            await asyncio.sleep(POLL_S)

    async def check(self) -> None:
        """Raises:
        SupersededError: the GCS names another process, or none. NoAnswerError: it does not say.
        """
        assert self._actor_id is not None
        process = await find_process(self._actor_id)
        if process != self._me:
            raise SupersededError(f"this Coordinator ran as {self._me}; by Ray's table it is {process} now")
