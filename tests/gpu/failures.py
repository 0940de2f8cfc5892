"""Steps that fail on a GPU: requests under suspicion are alone in every step in flight, and a lost device has suspects.

Standalone, `python tests/gpu/failures.py` loses the device of its own process, and says whether the engine knew whose
step it was.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from models import SHAPES, build, engine
from rows import Row

from pdray.engine.request import EngineRequest
from pdray.errors import StepFailedError
from pdray.sampling_params import SamplingParams

SHAPE = "Qwen3 16/8 d128"
NUM_REQUESTS = 6
LOST_AT = 5  # launches
LOST_TIMEOUT_S = 300.0


def make_engine() -> Any:
    """float32, so that no token depends on the batch."""
    with tempfile.TemporaryDirectory() as temporary:
        build(*SHAPES[SHAPE], Path(temporary))
        return engine(Path(temporary), "float32")


def requests(alone: set[int]) -> list[EngineRequest]:
    return [
        EngineRequest(
            number,
            [5 + (37 * number + i) % 1000 for i in range(30 + number)],
            SamplingParams(temperature=0.8, seed=-2 - number, max_tokens=24, ignore_eos=True),
            alone=number in alone,
        )
        for number in range(NUM_REQUESTS)
    ]


def note_steps_alone(running: Any) -> list[set[Any]]:
    """Keys of all steps in flight, at each launch while one of them is to be alone."""
    noted: list[set[Any]] = []
    launch = running.lane.launch

    def watch(*arguments: Any) -> Any:
        plans = list(running._scheduler.plans_in_flight)
        if any(plan.alone is not None for plan in plans):
            noted.append({key for plan in plans for key in plan.keys})
        return launch(*arguments)

    running.lane.launch = watch
    return noted


def check_failures() -> Iterator[Row]:
    """Two requests under suspicion among six, on the engine's own schedule; then a device that is lost."""
    suspects = {1, 4}
    expected = make_engine().run(*requests(set()))
    running = make_engine()
    alone = note_steps_alone(running)
    running.run(*requests(suspects))
    num_shared = sum(len(keys) > 1 for keys in alone)
    same = sum(running.ids(number) == expected.ids(number) for number in range(NUM_REQUESTS))
    figure = f"{len(alone)} steps alone, {num_shared} of them shared; {same} of {NUM_REQUESTS} say the same"
    ok = bool(alone) and not num_shared and same == NUM_REQUESTS
    yield Row("suspects alone", figure, "none shared, all the same", ok)
    del running, expected
    torch.cuda.empty_cache()
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LOST_TIMEOUT_S)
    figure = (done.stdout.strip() or done.stderr.strip() or "no answer").splitlines()[-1]
    yield Row("device lost in a step", figure[:160], "its requests are named", done.returncode == 0)


def lose_device() -> NoReturn:
    """Ends the process, with 0 if the step that fails names the requests in flight, and nobody else.

    At once: what lies on a lost device cannot even be freed.
    """
    running = make_engine()
    launch, num_launches = running.lane.launch, 0

    def failing(*arguments: Any) -> Any:
        nonlocal num_launches
        num_launches += 1
        if num_launches == LOST_AT:
            torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]  # an assertion on the device, seen later
        return launch(*arguments)

    running.lane.launch = failing
    for request in requests(set()):
        running.add(request)
    running.reserve(EngineRequest("reserved", [7] * 20, SamplingParams(temperature=0, max_tokens=4)))
    try:
        while running.has_work():
            running.step()
    except StepFailedError as error:
        named = set(error.keys)
        print(f"{sorted(map(str, named))}: {error}"[:160])
        sys.stdout.flush()
        os._exit(int(named != set(range(NUM_REQUESTS))))
    sys.exit("no step failed")


if __name__ == "__main__":
    lose_device()
