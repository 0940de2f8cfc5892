"""Step orders: what rank 0 tells the other ranks of each step that it launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np

from pdray.engine.ranks.shared_memory import SharedMemory
from pdray.engine.step.inputs import Spans, StepInputs, StepShape


class StepOrder(msgspec.Struct, frozen=True, array_like=True):
    """A step, but for its packed inputs, which lie in shared memory.

    Attributes:
        host: which of the host buffers has them.
        shape: of a StepShape.
        query_lens, kv_lens, num_decodes: of its Spans.
        copies: blocks (source, destination).
        score_rows: int64 in bytes; see ScoreInputs. None: nothing is scored.
    """

    host: int
    shape: tuple[int, int, int, bool, bool]
    query_lens: list[int]
    kv_lens: list[int]
    num_decodes: int
    copies: list[tuple[int, int]]
    score_rows: bytes | None

    @classmethod
    def of(cls, inputs: StepInputs) -> StepOrder:
        """The order to launch this, too."""
        scores, spans = inputs.scores, inputs.spans
        return cls(
            inputs.host,
            inputs.shape,
            spans.query_lens,
            spans.kv_lens,
            spans.num_decodes,
            [(copy.source, copy.destination) for copy in inputs.copies],
            None if scores is None else scores.host_rows.tobytes(),
        )

    @property
    def step_shape(self) -> StepShape:
        return StepShape(*self.shape)

    @property
    def spans(self) -> Spans:
        return Spans(self.query_lens, self.kv_lens, self.num_decodes)

    @property
    def scored(self) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        """score_rows as numbers; read-only."""
        return None if self.score_rows is None else np.frombuffer(self.score_rows, np.int64)


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(StepOrder).decode


class LaneRanks(NamedTuple):
    """What joins the lanes of one worker's ranks.

    Attributes:
        memory: that the host sides of their inputs lie in.
        announce: rank 0's: called before it launches a step. None: a rank that is told.
    """

    memory: SharedMemory
    announce: Callable[[StepOrder], None] | None = None


Ranks = LaneRanks | None
