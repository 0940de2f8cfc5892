"""Log-probabilities of prompt tokens: from the hidden states before them, in pieces of as many logits as fit easily."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pdray.engine.schedule.plan import StepPlan
from pdray.kernels.sampling.draw_rows import report
from pdray.kernels.sampling.rows import RECORD, WORDS, DrawTable, RowFlag
from pdray.models.decoder import Decoder
from pdray.sampling_params import MAX_LOGPROBS

MAX_PIECE = 128  # rows of logits at once: 40 MB for the largest vocabularies in bfloat16


class ScoreInputs(NamedTuple):
    """R prompt tokens of a step whose log-probabilities are asked for; padded to whole pieces.

    Attributes:
        rows: [R] int64, the step's tokens whose logits say what each follows from. token_ids: [R] int64.
        records: [R, WORDS] int32; see DrawTable.
        num: without padding. host_rows: as rows, on the host.
    """

    rows: torch.Tensor
    token_ids: torch.Tensor
    records: torch.Tensor
    num: int
    host_rows: np.ndarray[Any, np.dtype[np.int64]]


def score_piece(sizes: list[int]) -> int:
    """Rows of logits at once, of sizes whose kernels are loaded.

    An even number where there is one: kernels are compiled again for token ids whose address is no multiple of 16.
    """
    return max((size for size in sizes if size <= MAX_PIECE and size % 2 == 0), default=min(sizes))


def make_scores(plan: StepPlan, piece: int, device: torch.device) -> ScoreInputs | None:
    """None if nothing is asked for. Reads the sequences: under the engine's lock."""
    if not plan.num_scores:
        return None
    num = plan.num_scores
    padded = -(-num // piece) * piece
    on_gpu = device.type == "cuda"
    longs = torch.zeros((2, padded), dtype=torch.int64, pin_memory=on_gpu)
    words = torch.zeros((padded, WORDS), dtype=torch.int32, pin_memory=on_gpu)
    (rows, token_ids), records = longs.numpy(), words.numpy().view(RECORD)[:, 0]
    token, at = 0, 0
    for chunk in plan.chunks:
        end = at + chunk.num_scores
        if chunk.num_scores:
            rows[at:end] = np.arange(token, token + chunk.num_scores)
            token_ids[at:end] = chunk.sequence.token_ids[chunk.start + 1 : chunk.start + 1 + chunk.num_scores]
            records["flags"][at:end] = RowFlag.REPORTED
            records["num_logprobs"][at:end] = chunk.sequence.request.params.prompt_logprobs
        token, at = token + chunk.num_tokens, end
    there = longs.to(device, non_blocking=True)
    return ScoreInputs(there[0], there[1], words.to(device, non_blocking=True), num, rows)


def follow_scores(rows: np.ndarray[Any, np.dtype[np.int64]], device: torch.device) -> ScoreInputs:
    """Of a rank that computes its part of the logits, and reports nothing."""
    there = torch.from_numpy(rows.copy()).to(device)
    return ScoreInputs(there, there[:0], there[:0].int(), 0, rows)


def compute_scores(
    decoder: Decoder, hidden: torch.Tensor, inputs: ScoreInputs, table: DrawTable, piece: int
) -> torch.Tensor:
    """Reports of the tokens; see pdray.kernels.sampling.draw_rows.report.

    Args:
        hidden: [R, hidden_size], of ``inputs.rows``. table: of the same lane; its records are not read.

    Returns:
        [num, ...] int32 on the device; nothing where this rank has no logits.
    """
    packed = []
    for at in range(0, len(hidden), piece):
        part = slice(at, at + piece)
        logits = decoder.compute_logits(hidden[part])
        if len(logits):
            records = table._replace(records=inputs.records[part])
            packed.append(report(logits, records, inputs.token_ids[part], MAX_LOGPROBS))
    return torch.cat(packed)[: inputs.num] if packed else hidden.new_empty(0, dtype=torch.int32)
