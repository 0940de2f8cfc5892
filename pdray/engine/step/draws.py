"""What a step has drawn, on its way to the host."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from pdray.engine.schedule.plan import SampledRow
from pdray.engine.step.reports import unpack_reports

NUM_BUFFERS = 4  # a lane has at most two steps launched and not read


class Draws(NamedTuple):
    """Draws of a launched step.

    Attributes:
        packed: on the host, and on CUDA only once ``done`` has passed: token ids, or reports if num_top is not None.
        num_logprobs: see StepInputs.
        num_top: most likely tokens in each report; None if no row asked for any.
        scores: as packed, of prompt tokens: reports of MAX_LOGPROBS most likely tokens. None if none are asked for.
        launched_at: when the host had launched all of the step; on CPU, computed it.
    """

    packed: torch.Tensor
    num_logprobs: list[int | None]
    num_top: int | None
    done: torch.cuda.Event | None = None
    scores: torch.Tensor | None = None
    launched_at: float = 0.0

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


class DrawReader:
    """Sends draws to the host, in buffers and with events that are made once."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        if device.type == "cuda":
            for _ in range(NUM_BUFFERS):
                host = torch.empty(max_num_seqs, dtype=torch.int64, pin_memory=True)
                self._buffers.append((host, torch.cuda.Event()))

    def send(
        self,
        sampled: torch.Tensor,
        num_logprobs: list[int | None],
        reports: torch.Tensor | None = None,
        num_top: int | None = None,
        scores: torch.Tensor | None = None,
    ) -> Draws:
        """Copy token ids, or reports where there are any, on the current stream; nothing here waits.

        They must have been read before NUM_BUFFERS more are sent.
        """
        packed = sampled if reports is None else reports
        if packed.device.type == "cpu":
            return Draws(packed.clone(), num_logprobs, num_top, None, scores, time.perf_counter())
        host, done = self._buffers.pop(0)
        self._buffers.append((host, done))
        host = host[: len(sampled)].copy_(sampled, non_blocking=True) if reports is None else _to_host(reports)
        scores = None if scores is None else _to_host(scores)
        done.record()
        return Draws(host, num_logprobs, num_top, done, scores, time.perf_counter())


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A pinned copy, which is there when the current stream has come so far."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
