"""What becomes of a launched step: its draws, read late, and whether it is in flight."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pdray.engine.request import RequestUpdate
from pdray.engine.schedule.plan import SampledRow, StepPlan
from pdray.engine.step.inputs import StepInputs
from pdray.engine.step.reports import unpack_reports


class Draws(NamedTuple):
    """Draws of a launched step.

    Attributes:
        packed: on the host, and on CUDA only once ``done`` has passed: token ids, or reports if num_top is not None.
        num_logprobs: see StepInputs.
        num_top: most likely tokens in each report; None if no row asked for any.
        scores: as packed, of prompt tokens: reports of MAX_LOGPROBS most likely tokens. None if none are asked for.
    """

    packed: torch.Tensor
    num_logprobs: list[int | None]
    num_top: int | None
    done: torch.cuda.Event | None = None
    scores: torch.Tensor | None = None

    def is_done(self) -> bool:
        """Whether read() would not wait."""
        return self.done is None or self.done.query()

    def read(self) -> list[SampledRow]:
        """One row for each draw, in order. Waits for the step."""
        if self.done is not None:
            self.done.synchronize()
        if self.num_top is None:
            return [SampledRow(token_id) for token_id in self.packed.tolist()]
        return unpack_reports(self.packed.numpy(), self.num_logprobs, self.num_top)


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
