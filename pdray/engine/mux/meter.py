"""Durations of the steps of two lanes, as the controller's costs are told them."""

from __future__ import annotations

from typing import NamedTuple

from pdray.engine.mux.costs import Arrangement, StepCosts
from pdray.engine.schedule.plan import StepPlan

FULL = 0.9  # of its chunk of prompts: what a step needs to stand for its arrangement
FEW_DECODES = 16  # beside which a step of prompts is one of prompts alone


class LaunchNote(NamedTuple):
    """A step in flight, as it was when it was launched.

    Attributes:
        at: s. kv_tokens: of the sequences that decode in it, or beside it.
        arrangement: in force, and both sides waited; None: one side has the device.
    """

    plan: StepPlan
    at: float
    kv_tokens: int
    arrangement: Arrangement | None


class Meter:
    """A step's time runs from its launch, or from the end of the step before it in its lane if that was later."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._main_ended_at = self._piece_ended_at = float("-inf")

    def main_ended(self, step: LaunchNote, now: float, *, is_beside: bool) -> None:
        """A step of the main lane ended.

        Args:
            is_beside: a piece was in flight all the time.
        """
        seconds = now - max(step.at, self._main_ended_at)
        self._main_ended_at = now
        num_decodes, arrangement = step.plan.num_decodes, step.arrangement
        num_prompt_tokens = step.plan.num_tokens - num_decodes
        if seconds <= 0:
            return
        if arrangement is not None and arrangement.is_split:
            if is_beside and num_decodes and not num_prompt_tokens:
                self._costs.note_step(arrangement, step.kv_tokens, seconds, now)
        elif is_beside:
            return
        elif not num_prompt_tokens:
            self._costs.note_plain(step.kv_tokens, seconds)
        elif num_decodes <= FEW_DECODES:
            self._costs.note_prompts(num_prompt_tokens, seconds)
        elif arrangement is not None and num_prompt_tokens >= FULL * (arrangement.chunk or num_prompt_tokens):
            self._costs.note_step(arrangement, step.kv_tokens, seconds, now)
            self._costs.note_rate(arrangement, step.kv_tokens, num_prompt_tokens / seconds, now)

    def piece_ended(self, piece: LaunchNote, now: float, *, is_beside: bool) -> None:
        """A piece of prompts ended.

        Args:
            is_beside: sequences were decoding all the time.
        """
        seconds = now - max(piece.at, self._piece_ended_at)
        self._piece_ended_at = now
        if is_beside and piece.arrangement is not None and seconds > 0:
            self._costs.note_rate(piece.arrangement, piece.kv_tokens, piece.plan.num_tokens / seconds, now)
