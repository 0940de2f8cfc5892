"""Durations of the steps of two lanes, as the controller is told them."""

from __future__ import annotations

from typing import NamedTuple

from pdray.engine.mux.controller import Controller
from pdray.engine.mux.costs import Arrangement
from pdray.engine.schedule.plan import StepPlan
from pdray.engine.schedule.token_budget import work_of


class LaunchNote(NamedTuple):
    """A step in flight, as it was when it was launched.

    Attributes:
        at: s. arrangement: in force, and both sides waited; None: one side has the device.
    """

    plan: StepPlan
    at: float
    arrangement: Arrangement | None


class Meter:
    """A step's time runs from its launch, or from the end of the step before it in its lane if that was later.

    What steps without pieces beside them take is told to the token budget by the engine.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._main_ended_at = self._piece_ended_at = float("-inf")

    def main_ended(self, step: LaunchNote, now: float, *, is_beside: bool) -> None:
        """A step of the main lane ended.

        Args:
            is_beside: a piece was in flight all the time.
        """
        seconds = now - max(step.at, self._main_ended_at)
        self._main_ended_at = now
        if seconds <= 0:
            return
        num_decodes, arrangement = step.plan.num_decodes, step.arrangement
        is_split = arrangement is not None and arrangement.decode_sms is not None
        if is_split and is_beside and num_decodes == step.plan.num_tokens:
            assert arrangement is not None and arrangement.decode_sms is not None
            self._controller.costs.note_step(arrangement.decode_sms, num_decodes, seconds, now)

    def piece_ended(self, piece: LaunchNote, now: float, *, is_beside: bool) -> None:
        """A piece of prompts ended.

        Args:
            is_beside: sequences were decoding all the time.
        """
        seconds = now - max(piece.at, self._piece_ended_at)
        self._piece_ended_at = now
        if is_beside and piece.arrangement is not None and piece.arrangement.decode_sms is not None and seconds > 0:
            work = work_of(piece.plan)
            rate = work.num_prompt_tokens / seconds
            self._controller.costs.note_rate(piece.arrangement.decode_sms, work.context, rate, now)
