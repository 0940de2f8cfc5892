"""How each row of logits becomes a token, as one record a row: what a step copies to the device in one go."""

from __future__ import annotations

from enum import IntFlag
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pdray.kernels.sampling.history import BIASES, END, biased_tokens
from pdray.kernels.sampling.mask import TokenMasks
from pdray.kernels.sampling.metadata import (
    GREEDY_TEMPERATURE,
    BannedTokens,
    BiasedTokens,
    LogprobRows,
    Parameters,
    PenaltyRows,
    RandomRows,
    SamplingMetadata,
    has_filter,
    has_penalty,
)

Records = np.ndarray[Any, np.dtype[np.void]]

# The kernels read words of 32 bits: a field's place here is its word, and the last two fields have two each.
RECORD = np.dtype(
    [
        ("temperature", np.float32),
        ("min_p", np.float32),
        ("top_p", np.float32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("flags", np.int32),
        ("top_k", np.int32),
        ("slot", np.int32),
        ("min_tokens", np.int32),
        ("mask", np.int32),
        ("num_logprobs", np.int32),
        ("seed", np.int64),
        ("position", np.int64),
    ]
)
WORDS = RECORD.itemsize // 4


class RowFlag(IntFlag):
    """What a row needs beyond temperature and seed; a record of zeros is a greedy row.

    LATE: drawn by draw_late(): has a filter and is not greedy, or its mask comes late.
    PENALIZED: a penalty; its drawn tokens are counted in its slot.
    ENDS_BANNED: before min_tokens, the tokens that its slot marks as ends.
    MASKED: has a mask. REPORTED: its log-probabilities are asked for.
    BIASED: numbers of its slot are added to logits.
    """

    LATE = 1
    PENALIZED = 2
    ENDS_BANNED = 4
    MASKED = 8
    REPORTED = 16
    BIASED = 32


class DrawTable(NamedTuple):
    """What S draws need, on one device.

    Attributes:
        records: [S, WORDS] int32, of RECORD: temperature (0, less, or NaN: greedy), min_p (0 is off), top_k (below 1 is
            off), top_p (1 is off), repetition, presence and frequency penalty; flags, of RowFlag; slot, the row's in
            ``history``, and no other row's; mask, its row in ``masks``; num_logprobs, most likely tokens to report;
            seed and position, as in SamplingRow.
        history: [H, BIASES + vocab_size] int32; see history.py. Draws of rows that are PENALIZED add to it.
        masks: [M, num_mask_words(vocab_size)] int32; see TokenMasks.
    """

    records: Tensor
    history: Tensor
    masks: Tensor

    @property
    def vocab_size(self) -> int:
        return self.history.shape[1] - BIASES

    def view(self) -> Records:
        """The records as numpy has them; of a table on the CPU."""
        array: Records = self.records.numpy().view(RECORD)[:, 0]
        return array

    def metadata(self, rows: Tensor) -> SamplingMetadata:
        """What sample() takes, for some of the rows [R] int64; of a table on the CPU."""
        records = self.view()[rows.numpy()]
        flags, slots = records["flags"], records["slot"]
        return SamplingMetadata(
            penalties=self._penalties(records, flags),
            banned=self._banned(records, flags, slots),
            random=_random(records),
            logprobs=_logprobs(records, flags),
            masks=self._masks(records, flags),
            bias=self._bias(flags, slots),
        )

    def remember(self, rows: Tensor, token_ids: Tensor) -> None:
        """Add what ``rows`` [R] int64 have drawn [R] int64 to their histories; of a table on the CPU."""
        records = self.view()[rows.numpy()]
        counted = (records["flags"] & RowFlag.PENALIZED) != 0
        self.history.numpy()[records["slot"][counted], BIASES + token_ids.numpy()[counted]] += 1

    def _penalties(self, records: Records, flags: Any) -> PenaltyRows | None:
        index = np.flatnonzero(flags & RowFlag.PENALIZED)
        if not len(index):
            return None
        return PenaltyRows(
            torch.from_numpy(index),
            torch.from_numpy(records["repetition"][index]),
            torch.from_numpy(records["presence"][index]),
            torch.from_numpy(records["frequency"][index]),
            self.history[torch.from_numpy(records["slot"][index].astype(np.int64)), BIASES:],
        )

    def _banned(self, records: Records, flags: Any, slots: Any) -> BannedTokens | None:
        banned = []
        early = records["position"] < records["min_tokens"]
        for i in np.flatnonzero(((flags & RowFlag.ENDS_BANNED) != 0) & early):
            banned.append((i, np.flatnonzero(self.history[slots[i], BIASES:].numpy() & END)))
        if not banned:
            return None
        rows = np.repeat([i for i, _ in banned], [len(ids) for _, ids in banned])
        return BannedTokens(torch.from_numpy(rows), torch.from_numpy(np.concatenate([ids for _, ids in banned])))

    def _masks(self, records: Records, flags: Any) -> TokenMasks | None:
        index = np.flatnonzero(flags & RowFlag.MASKED)
        if not len(index):
            return None
        places = torch.from_numpy(records["mask"][index].astype(np.int64))
        return TokenMasks(torch.from_numpy(index), self.masks[places])

    def _bias(self, flags: Any, slots: Any) -> BiasedTokens | None:
        index = np.flatnonzero(flags & RowFlag.BIASED)
        if not len(index):
            return None
        found = [biased_tokens(self.history[slots[i]].numpy()) for i in index]
        rows = np.repeat(index, [len(token_ids) for token_ids, _ in found])
        token_ids, values = (torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True))
        return BiasedTokens(torch.from_numpy(rows), token_ids, values)


def make_record(
    params: Parameters, seed: int, *, slot: int = 0, min_tokens: int = 0, has_mask: bool = False
) -> Records:
    """One record [1] for parameters; its position and its mask are its caller's.

    Args:
        slot: read where the row needs one: see needs_slot(). has_mask: one that comes late.
    """
    record = np.zeros(1, RECORD)
    is_random = params.temperature >= GREEDY_TEMPERATURE
    record["temperature"] = params.temperature if is_random else 0.0
    record["min_p"], record["top_p"], record["top_k"] = params.min_p, params.top_p, params.top_k
    record["repetition"], record["presence"] = params.repetition_penalty, params.presence_penalty
    record["frequency"], record["slot"], record["min_tokens"] = params.frequency_penalty, slot, min_tokens
    record["num_logprobs"], record["seed"] = params.logprobs or 0, seed
    record["flags"] = (
        RowFlag.LATE * (has_mask or (is_random and has_filter(params)))
        | RowFlag.MASKED * has_mask
        | RowFlag.BIASED * (params.logit_bias is not None)
        | RowFlag.PENALIZED * has_penalty(params)
        | RowFlag.ENDS_BANNED * (min_tokens > 0)
        | RowFlag.REPORTED * (params.logprobs is not None)
    )
    return record


def needs_slot(params: Parameters, min_tokens: int) -> bool:
    """Whether a sequence's draws look at anything that is kept of it."""
    return has_penalty(params) or min_tokens > 0 or params.logit_bias is not None


def _random(records: Records) -> RandomRows | None:
    index = np.flatnonzero(records["temperature"] > 0)
    if not len(index):
        return None
    chosen = {name: torch.from_numpy(records[name][index].copy()) for name in RECORD.names or ()}
    return RandomRows(
        torch.from_numpy(index),
        chosen["temperature"],
        chosen["seed"],
        chosen["position"],
        chosen["min_p"] if bool((chosen["min_p"] > 0).any()) else None,
        chosen["top_k"].long() if bool((chosen["top_k"] > 0).any()) else None,
        chosen["top_p"] if bool((chosen["top_p"] < 1).any()) else None,
    )


def _logprobs(records: Records, flags: Any) -> LogprobRows | None:
    index = np.flatnonzero(flags & RowFlag.REPORTED)
    if not len(index):
        return None
    return LogprobRows(torch.from_numpy(index), int(records["num_logprobs"][index].max()))
