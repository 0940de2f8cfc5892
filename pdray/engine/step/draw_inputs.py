"""From a plan's draws to the records that say how each is made."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pdray.engine.schedule.plan import Draw
from pdray.engine.step.histories import Histories
from pdray.kernels.sampling.history import Join, Joins, make_mask
from pdray.kernels.sampling.metadata import SamplingRow, has_penalty
from pdray.kernels.sampling.rows import RECORD, WORDS, Records, RowFlag, make_record


class DrawNeeds(NamedTuple):
    """What a step's draws need beyond their records.

    Attributes:
        joins: sequences that the device is to remember from now on; None: none.
        has_late: some draws are made behind the step. may_need_search: see draw_late().
        has_reports: log-probabilities are asked for.
    """

    joins: Joins | None = None
    has_late: bool = False
    may_need_search: bool = False
    has_reports: bool = False


class Masks:
    """Which tokens each of a step's draws may take, for those that rules bind.

    As InputBuffers: pinned on CUDA, and two of it, of which one is filled while the other may still be copied.

    Attributes:
        words: [max_num_seqs, ceil(vocab_size / 32)] int32 on the device; see DrawTable.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        shape, on_gpu = (max_num_seqs, -(-vocab_size // 32)), device.type == "cuda"
        self._hosts = [torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2 if on_gpu else 1)]
        self.words = torch.zeros(shape, dtype=torch.int32, device=device) if on_gpu else self._hosts[0]

    def fill(self, banned: list[tuple[int, ...]]) -> None:
        """One mask for each tuple of token ids, which it forbids."""
        host = self._hosts[0]
        self._hosts.reverse()
        for i, ids in enumerate(banned):
            allowed = np.ones(self.vocab_size, dtype=np.bool_)
            allowed[list(ids)] = False
            host.numpy()[i] = make_mask(allowed)
        if self.words is not host:
            self.words[: len(banned)].copy_(host[: len(banned)], non_blocking=True)


def fill_records(
    words: np.ndarray[Any, np.dtype[np.int32]], draws: list[Draw], num_draws: int, histories: Histories, masks: Masks
) -> DrawNeeds:
    """Write the draws' records, and zeros up to ``num_draws``. Reads the sequences: under the engine's lock.

    Args:
        words: [S, WORDS] of a DrawTable's records.
    """
    histories.release_ended()
    joins: list[Join] = []
    made = [draw.sequence.draw_record or _make_record(draw, histories, joins) for draw in draws]
    num = len(draws)
    words[:num] = np.frombuffer(b"".join(made), np.int32).reshape(num, WORDS)
    words[num:num_draws] = 0
    records: Records = words.view(RECORD)[:num, 0]
    records["position"] = [draw.position for draw in draws]
    banned = _apply_rules(records, draws)
    if banned:
        masks.fill(banned)
    flags = records["flags"]
    every = int(np.bitwise_or.reduce(flags))
    if not every & (RowFlag.LATE | RowFlag.REPORTED):
        return DrawNeeds(histories.pack(joins))
    late = records[(flags & int(RowFlag.LATE)) != 0]
    return DrawNeeds(
        joins=histories.pack(joins),
        has_late=len(late) > 0,
        may_need_search=bool(((late["top_k"] > 0) | (late["top_p"] < 1)).any()),
        has_reports=bool(every & RowFlag.REPORTED),
    )


def _make_record(draw: Draw, histories: Histories, joins: list[Join]) -> bytes:
    """The sequence's own, from its first draw on; with penalties or min_tokens it gets a slot."""
    sequence = draw.sequence
    params = sequence.request.params
    slot = 0
    if has_penalty(params) or params.min_tokens:
        joins.append(histories.join(draw))
        slot = joins[-1].slot
    record = make_record(params, sequence.seed, slot=slot, min_tokens=params.min_tokens)
    sequence.draw_record = record.tobytes()
    return sequence.draw_record


def _apply_rules(records: Any, draws: list[Draw]) -> list[tuple[int, ...]]:
    """Give each draw that a rule binds a mask of its own; returns the tokens that each mask bans."""
    banned: list[tuple[int, ...]] = []
    for i, draw in enumerate(draws):
        sequence = draw.sequence
        if not sequence.request.has_rules:
            continue
        plain = row = SamplingRow(sequence.request.params, sequence.seed, draw.position)
        for rule in sequence.rules:
            row = rule.change(row)
        assert row._replace(banned_token_ids=()) == plain, "a rule may only ban tokens"
        if row.banned_token_ids:
            records["mask"][i] = len(banned)
            records["flags"][i] |= RowFlag.MASKED
            banned.append(tuple(row.banned_token_ids))
    return banned
