"""From a plan's draws to the records that say how each is made."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pdray.engine.schedule.plan import Draw
from pdray.engine.step.histories import Histories
from pdray.kernels.sampling.history import Join, Joins
from pdray.kernels.sampling.rows import RECORD, WORDS, Records, RowFlag, make_record, needs_slot


class DrawNeeds(NamedTuple):
    """What a step's draws need beyond their records.

    Attributes:
        joins: sequences that the device is to remember from now on; None: none.
        num_masks: draws that wait for a mask, in the order of the draws.
        has_late: some draws are made behind the step. may_filter, may_need_search: see draw_late().
        has_reports: log-probabilities are asked for.
    """

    joins: Joins | None = None
    num_masks: int = 0
    has_late: bool = False
    may_filter: bool = False
    may_need_search: bool = False
    has_reports: bool = False


class LastRecords:
    """Of the step before: most steps draw for the same sequences as it, in the same order."""

    def __init__(self) -> None:
        self.made = b""
        self.words = np.zeros((0, WORDS), np.int32)
        self.needs = DrawNeeds()


def fill_records(
    words: np.ndarray[Any, np.dtype[np.int32]],
    draws: list[Draw],
    num_draws: int,
    histories: Histories,
    last: LastRecords,
) -> DrawNeeds:
    """Write the draws' records, and zeros up to ``num_draws``. Reads the sequences: under the engine's lock.

    Args:
        words: [S, WORDS] of a DrawTable's records.
        last: of the same caller.
    """
    histories.release_ended(draws)
    joins: list[Join] = []
    made = b"".join([draw.sequence.draw_record or _make_record(draw, histories, joins) for draw in draws])
    if made != last.made:
        last.made, last.words = made, np.frombuffer(made, np.int32).reshape(len(draws), WORDS).copy()
        last.needs = _needs_of(last.words.view(RECORD)[:, 0])
    num = len(draws)
    words[:num] = last.words
    words[num:num_draws] = 0
    words.view(RECORD)[:num, 0]["position"] = [draw.position for draw in draws]
    return last.needs._replace(joins=histories.pack(joins))


def _needs_of(records: Records) -> DrawNeeds:
    """What these draws need, but for ``joins``; numbers those that wait for a mask."""
    flags = records["flags"]
    masked = (flags & int(RowFlag.MASKED)) != 0
    num_masks = int(masked.sum())
    records["mask"][masked] = range(num_masks)
    every = int(np.bitwise_or.reduce(flags))
    if not every & (RowFlag.LATE | RowFlag.REPORTED):
        return DrawNeeds()
    late = records[(flags & int(RowFlag.LATE)) != 0]
    random = late[late["temperature"] > 0]
    may_need_search = bool(((random["top_k"] > 0) | (random["top_p"] < 1)).any())
    return DrawNeeds(
        num_masks=num_masks,
        has_late=len(late) > 0,
        may_filter=may_need_search or bool((random["min_p"] > 0).any()),
        may_need_search=may_need_search,
        has_reports=bool(every & RowFlag.REPORTED),
    )


def _make_record(draw: Draw, histories: Histories, joins: list[Join]) -> bytes:
    """The sequence's own, from its first draw on; where its draws look at earlier tokens or biases, it gets a slot."""
    sequence = draw.sequence
    params, has_mask = sequence.request.params, sequence.request.has_rules
    min_tokens = 0 if has_mask else params.min_tokens  # a mask says it too
    slot = 0
    if needs_slot(params, min_tokens):
        joins.append(histories.join(draw))
        slot = joins[-1].slot
    record = make_record(params, sequence.seed, slot=slot, min_tokens=min_tokens, has_mask=has_mask)
    sequence.draw_record = record.tobytes()
    return sequence.draw_record
