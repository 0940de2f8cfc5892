"""The prompts of one call of LLM.generate(): all are checked before any is sent, a few at a time."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pdray.errors import InvalidRequestError
from pdray.outputs import RequestOutput
from pdray.router.router import Router
from pdray.sampling_params import SamplingParams

# Between rounds of so many the event loop does what else there is: other calls' tokens come on it.
SENT_IN_ONE_ROUND = 16


class Batch(NamedTuple):
    """Attributes:
    params: one for each prompt. default_max_tokens: see Router.check().
    """

    prompts: Sequence[str | list[int]]
    params: Sequence[SamplingParams]
    default_max_tokens: int | None = None


class Checked(NamedTuple):
    """What is left of a prompt to be answered: its token ids, and parameters with nothing left open."""

    token_ids: list[int]
    params: SamplingParams


async def answer(
    batch: Batch, router: Router, max_waiting: int, on_answer: Callable[[], object]
) -> list[RequestOutput]:
    """Answers in the prompts' order.

    Args:
        max_waiting: requests that wait for a lease at once; each call has its own.
        on_answer: called after each answer.

    Raises:
        InvalidRequestError: a prompt or parameter that cannot be served. Nothing was computed then.
    """
    checked = await _check_all(batch, router)
    places = asyncio.Semaphore(max(1, max_waiting))  # for each call: none waits for another's
    call_id = uuid.uuid4().hex

    async def answer_one(index: int) -> RequestOutput:
        prompt, (token_ids, params) = batch.prompts[index], checked[index]
        async with places:
            request = await router.submit(
                token_ids,
                params,
                request_id=f"cmpl-{call_id}-{index}",
                text=prompt if isinstance(prompt, str) else None,
                is_checked=True,
                whole=True,
            )
        try:
            output = await request.wait()
        finally:
            request.abort()
        on_answer()
        return output

    tasks: list[asyncio.Task[RequestOutput]] = []
    try:
        async with asyncio.TaskGroup() as group:
            for index in range(len(checked)):
                tasks.append(group.create_task(answer_one(index)))
                if len(tasks) % SENT_IN_ONE_ROUND == 0:
                    await asyncio.sleep(0)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first; the group has ended the others
    return [task.result() for task in tasks]


async def _check_all(batch: Batch, router: Router) -> list[Checked]:
    """A mistake in the last prompt is told before the first one is computed."""
    checked = []
    for index, (prompt, params) in enumerate(zip(batch.prompts, batch.params, strict=True)):
        try:
            checked.append(Checked(*await router.check(prompt, params, batch.default_max_tokens)))
        except InvalidRequestError as error:
            if len(batch.prompts) == 1:
                raise
            raise InvalidRequestError(f"prompts[{index}]: {error}", error.param) from error
        if isinstance(prompt, str) or index % SENT_IN_ONE_ROUND == 0:
            await asyncio.sleep(0)  # other calls' tokens come on this loop
    return checked
