"""Python imports this by itself, in every process whose PYTHONPATH names this folder: engines fail on marked requests.

A request is marked by a token id of its prompt. The fault comes in the midst of a step, after some layers were told.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from pdray.testing.patched_import import patch_when_loaded

ENGINE = "pdray.engine.engine"
AT_LAYER = 20


class EngineLostError(BaseException):
    """No engine survives it, on whatever device."""


class Fault(NamedTuple):
    """from_outputs: tokens that the request has when the first step fails."""

    error: BaseException
    from_outputs: int


FAULTS = {
    48_101: Fault(IndexError("index -1 is out of bounds"), 0),
    48_102: Fault(IndexError("index -1 is out of bounds"), 6),
    48_103: Fault(EngineLostError("the device is lost"), 0),
    48_104: Fault(EngineLostError("the device is lost"), 6),
}


def fault_of(plan: Any) -> Fault | None:
    """What a step is to fail with, if it computes a marked request that has come so far."""
    for chunk in plan.chunks:
        fault = FAULTS.get(chunk.sequence.request.prompt_token_ids[0])
        if fault is not None and chunk.sequence.num_output_tokens >= fault.from_outputs:
            return fault
    return None


def patch(module: ModuleType) -> None:
    """Let the engine's steps fail."""
    launch_of = module.Engine._launch

    def launch(engine: Any, plan: Any, lane: Any) -> Any:
        fault = fault_of(plan)
        if fault is None:
            return launch_of(engine, plan, lane)
        launch_lane = lane.launch

        def launch_to_fail(inputs: Any, tell: Callable[[range, Any], None] | None) -> Any:
            def on_group(layers: range, ready: Any) -> None:
                if AT_LAYER in layers:
                    raise fault.error
                if tell is not None:
                    tell(layers, ready)

            return launch_lane(inputs, on_group)

        lane.launch = launch_to_fail
        try:
            return launch_of(engine, plan, lane)
        finally:
            del lane.launch

    module.Engine._launch = launch


patch_when_loaded(ENGINE, patch)
