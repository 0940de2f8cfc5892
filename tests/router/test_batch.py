"""The prompts of one call: when each is checked, when it leaves, and what its router knows of those on their way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdray.engine.schedule.demand import Demand
from pdray.errors import InvalidRequestError, NoWorkerError
from pdray.router.batch import SENT_IN_ONE_ROUND, Batch, answer
from pdray.router.link import WorkerLink
from pdray.router.request import Request
from pdray.sampling_params import SamplingParams
from pdray.wire.message import LegKey

PARAMS = SamplingParams(temperature=0, max_tokens=4)


class NotedRouter:
    """Serves at once, and notes what it is asked in which round of the event loop."""

    def __init__(self) -> None:
        self.checked: list[list[int]] = []
        self.rounds: list[list[int]] = [[]]

    async def check(self, prompt: list[int], params: SamplingParams, default: int | None) -> tuple[list[int], Any]:
        assert not any(self.rounds), "something is computed already"
        if prompt == [1313]:
            raise InvalidRequestError("1313 brings bad luck", "prompt")
        self.checked.append(prompt)
        return prompt, params

    async def submit(
        self, prompt: list[int], params: SamplingParams, *, is_checked: bool, whole: bool, **_: object
    ) -> Any:
        assert is_checked and whole and prompt in self.checked
        self.rounds[-1].append(prompt[0])

        class Request:
            async def wait(self) -> str:
                return f"answer to {prompt[0]}"

            def abort(self) -> None: ...

        return Request()

    async def count_rounds(self) -> None:
        while True:
            self.rounds.append([])
            await asyncio.sleep(0)


async def test_the_first_prompts_have_left_before_the_last_is_submitted() -> None:
    router, number, answered = NotedRouter(), 3 * SENT_IN_ONE_ROUND + 1, []
    counting = asyncio.ensure_future(router.count_rounds())
    batch = Batch([[i] for i in range(number)], [PARAMS] * number)
    outputs: Any = await answer(batch, router, 1000, lambda: answered.append(1))  # type: ignore[arg-type]
    counting.cancel()
    assert outputs == [f"answer to {i}" for i in range(number)] and len(answered) == number
    used = [each for each in router.rounds if each]
    assert [i for each in used for i in each] == list(range(number))
    assert len(used) == 4 and max(map(len, used)) == SENT_IN_ONE_ROUND


async def test_a_mistake_in_the_last_prompt_is_told_before_the_first_is_computed() -> None:
    router = NotedRouter()
    with pytest.raises(InvalidRequestError, match=r"prompts\[2\]: 1313 brings bad luck"):
        await answer(Batch([[1], [2], [1313]], [PARAMS] * 3), router, 1000, print)  # type: ignore[arg-type]
    assert not any(router.rounds)


async def test_what_was_checked_waits_for_a_worker_that_is_away(make_cluster: Any) -> None:
    """Workers may die while prompts of a long batch wait for their turn."""
    cluster = await make_cluster(empty=True, max_queue_size=100)
    with pytest.raises(NoWorkerError):
        await cluster.router.submit([1, 2, 3], PARAMS, request_id="unchecked")
    waiting = asyncio.ensure_future(cluster.router.submit([1, 2, 3], PARAMS, request_id="checked", is_checked=True))
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    await cluster.show(cluster.new_worker("prefill-0", "prefill"), cluster.new_worker("decode-0", "decode"))
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 0)
    waiting.cancel()


async def test_what_is_asked_for_is_the_sum_of_what_was_not_answered(make_cluster: Any) -> None:
    link = WorkerLink((await make_cluster()).decode.info)
    for number in range(5):
        link.ask(LegKey("r", number), Demand(tokens=1, blocks=10 + number, places=1 + number % 2, length=9))
    link.ask(LegKey("r", 4), Demand(tokens=1, blocks=20, places=2, length=9))  # asked again
    link.answered(LegKey("r", 1))
    link.answered(LegKey("r", 1))
    link.answered(LegKey("unknown", 0))
    state = link.decode_state()
    assert (state.asked_blocks, state.asked_places) == (10 + 12 + 13 + 20, 1 + 1 + 2 + 2)
    for number in range(5):
        link.answered(LegKey("r", number))
    assert (link.decode_state().asked_blocks, link.decode_state().asked_places) == (0, 0) and not link.asked


def test_a_whole_answer_is_asked_for_late_tokens_unless_a_stop_string_may_end_it() -> None:
    """Its worker would compute what nobody wants until the router has seen the string."""
    for stop, whole in (((), True), (("end",), False)):
        for wanted in (True, False):
            params = SamplingParams(max_tokens=5, stop=stop)
            leg = Request("r", None, [1, 2], params, 0, None, 0.0, whole=wanted).start()
            assert leg.lease_request(None).whole is (whole and wanted)
