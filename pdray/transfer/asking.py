"""Waiting for what a worker's other ranks answer; see OtherRank."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from pdray.errors import RankDiedError, TransferError
from pdray.transfer.streams import DRAIN_TIMEOUT_S


async def answers_of(futures: list[Future[bytes]]) -> list[bytes]:
    """What they answer, in order; waits for all of them.

    Raises:
        RankDiedError, TransferError: one could not.
    """
    waiting = (asyncio.wrap_future(future) for future in futures)
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if isinstance(answer, bytes)]


def wait_until_ended(futures: list[Future[bytes]]) -> None:
    """Until ranks have ended what they were told to end. One that was seen dead has. Not for the event loop's thread.

    Raises:
        TransferError: one does not end.
    """
    for future in futures:
        try:
            future.result(DRAIN_TIMEOUT_S + 1.0)
        except RankDiedError:
            continue
        except TimeoutError:
            text = f"a rank has not ended its transfers {DRAIN_TIMEOUT_S:g} s after they were to end"
            raise TransferError(text) from None
