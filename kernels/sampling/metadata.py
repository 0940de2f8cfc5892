"""What a batch's sampling needs, as tensors: each group of parameters holds only the rows that use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pdray.kernels.sampling.history import BIASES, Join, no_history, pack_joins, remember
from pdray.kernels.sampling.mask import TokenMasks

GREEDY_TEMPERATURE = 1e-5  # below it a row is greedy, as in vLLM


class Parameters(Protocol):
    """What is read of a request's SamplingParams."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def logprobs(self) -> int | None: ...
    @property
    def logit_bias(self) -> Mapping[int, float] | None: ...


class SamplingRow(NamedTuple):
    """One row of logits that is to become a token.

    Attributes:
        seed: this completion's own (params.seed + index), an int64; not read when greedy.
        position: 0-based index of the output token to draw.
        output_token_ids: earlier output tokens, in order; prompt and output are read only for penalties.
        banned_token_ids: ids that must not be drawn now (end-of-sequence and stop ids before min_tokens).
    """

    params: Parameters
    seed: int
    position: int
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()


class PenaltyRows(NamedTuple):
    """Rows with any penalty: rows [R] int64; repetition, presence, frequency [R] float32 (1, 0, 0 is none);
    history [R, at most vocab_size] int32: see history.py; ids beyond it are in neither prompt nor output."""

    rows: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    history: Tensor


class BiasedTokens(NamedTuple):
    """Logits that something is added to: rows, token_ids [K] int64, values [K] float32."""

    rows: Tensor
    token_ids: Tensor
    values: Tensor


class BannedTokens(NamedTuple):
    """Pairs (row, token id) that must not be drawn: rows [K], token_ids [K] int64."""

    rows: Tensor
    token_ids: Tensor


class RandomRows(NamedTuple):
    """Rows that are not greedy: rows, seeds, positions [R] int64, temperature [R] float32 > 0.

    Each filter is None where no row uses it: min_p [R] float32 (0 is off), top_k [R] int64 (below 1 is off),
    top_p [R] float32 (1 is off).
    """

    rows: Tensor
    temperature: Tensor
    seeds: Tensor
    positions: Tensor
    min_p: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None


class LogprobRows(NamedTuple):
    """Rows [R] int64 whose log-probabilities are reported; num_logprobs: the most that any of them asked for."""

    rows: Tensor
    num_logprobs: int


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """How to sample a batch. A group is None where no row needs it; all None is greedy."""

    penalties: PenaltyRows | None = None
    banned: BannedTokens | None = None
    random: RandomRows | None = None
    logprobs: LogprobRows | None = None
    masks: TokenMasks | None = None
    bias: BiasedTokens | None = None

    @classmethod
    def build(cls, rows: Sequence[SamplingRow], device: torch.device | str = "cpu") -> SamplingMetadata:
        """Tensors for rows of logits in this order."""
        return cls(
            penalties=_build_penalties(rows, device),
            banned=_build_banned(rows, device),
            random=_build_random(rows, device),
            logprobs=_build_logprobs(rows, device),
            bias=_build_bias(rows, device),
        )


def has_filter(params: Parameters) -> bool:
    """Whether a draw looks at no more than some of the tokens."""
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def has_penalty(params: Parameters) -> bool:
    """Whether logits depend on the tokens before them."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _build_penalties(rows: Sequence[SamplingRow], device: torch.device | str) -> PenaltyRows | None:
    index = [i for i, row in enumerate(rows) if has_penalty(row.params)]
    if not index:
        return None
    params = [rows[i].params for i in index]
    return PenaltyRows(
        _ints(index, device),
        _floats([p.repetition_penalty for p in params], device),
        _floats([p.presence_penalty for p in params], device),
        _floats([p.frequency_penalty for p in params], device),
        _history([rows[i] for i in index]).to(device),
    )


def _build_bias(rows: Sequence[SamplingRow], device: torch.device | str) -> BiasedTokens | None:
    biased = [(i, *item) for i, row in enumerate(rows) for item in (row.params.logit_bias or {}).items()]
    if not biased:
        return None
    row_index, token_ids, values = zip(*biased, strict=True)
    return BiasedTokens(_ints(list(row_index), device), _ints(list(token_ids), device), _floats(list(values), device))


def _build_banned(rows: Sequence[SamplingRow], device: torch.device | str) -> BannedTokens | None:
    pairs = [(i, token_id) for i, row in enumerate(rows) for token_id in row.banned_token_ids]
    if not pairs:
        return None
    return BannedTokens(_ints([i for i, _ in pairs], device), _ints([token_id for _, token_id in pairs], device))


def _build_random(rows: Sequence[SamplingRow], device: torch.device | str) -> RandomRows | None:
    index = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_TEMPERATURE]
    if not index:
        return None
    params = [rows[i].params for i in index]
    return RandomRows(
        _ints(index, device),
        _floats([p.temperature for p in params], device),
        _ints([rows[i].seed for i in index], device),
        _ints([rows[i].position for i in index], device),
        _floats([p.min_p for p in params], device) if any(p.min_p > 0 for p in params) else None,
        _ints([p.top_k for p in params], device) if any(p.top_k > 0 for p in params) else None,
        _floats([p.top_p for p in params], device) if any(p.top_p < 1 for p in params) else None,
    )


def _build_logprobs(rows: Sequence[SamplingRow], device: torch.device | str) -> LogprobRows | None:
    asked = [(i, row.params.logprobs) for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return None
    return LogprobRows(_ints([i for i, _ in asked], device), max(number for _, number in asked))


def _ints(values: list[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _floats(values: list[float], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _history(rows: Sequence[SamplingRow]) -> Tensor:
    width = 1 + max((max([*row.prompt_token_ids, *row.output_token_ids], default=-1) for row in rows), default=-1)
    history = no_history(len(rows), width)
    joins = [Join(i, row.prompt_token_ids, row.output_token_ids, ()) for i, row in enumerate(rows)]
    remember(history, pack_joins(joins))
    return history[:, BIASES:]
