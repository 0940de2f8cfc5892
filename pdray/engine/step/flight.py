"""What becomes of a launched step: its draws wait for masks, or it is in flight."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pdray.engine.request import RequestUpdate
from pdray.engine.schedule.plan import StepPlan
from pdray.engine.step.draws import Draws
from pdray.engine.step.inputs import StepInputs


class Undrawn(NamedTuple):
    """A launched step whose late draws wait for masks."""

    inputs: StepInputs
    logits: torch.Tensor
    scores: torch.Tensor | None


class Flight(NamedTuple):
    """A step that was launched."""

    plan: StepPlan
    draws: Draws


class Settled(NamedTuple):
    """Attributes:
    flight: a step that is in flight, if any. news: of requests that ended with its launch.
    """

    flight: Flight | None
    news: list[RequestUpdate]


Launched = Flight | Undrawn | Exception  # the last is a plan's fault alone, and has left everything else as it was
