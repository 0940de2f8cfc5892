"""Log-probabilities of a prompt's tokens on their way from an engine to the router: rows of 32-bit words."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from pdray.errors import InvalidRequestError
from pdray.outputs import Logprob
from pdray.sampling_params import SamplingParams

Words = np.ndarray[Any, np.dtype[np.int32]]

HEAD = 3  # words of a row before its lists: token id, rank, float32 bits of the log-probability
MAX_BYTES = 32 * 1024 * 1024


class PromptScores(msgspec.Struct, frozen=True, array_like=True):
    """Of all tokens of a prompt but the first, which follows nothing.

    Attributes:
        num_top: most likely tokens of each.
        data: little-endian int32 rows of HEAD + 2 * num_top words: the head, num_top ids, num_top log-probabilities.
    """

    num_top: int
    data: bytes

    def unpack(self) -> list[dict[int, Logprob]]:
        """One entry for each token: its own log-probability first, then the most likely ones."""
        rows = np.frombuffer(self.data, "<i4").reshape(-1, num_words(self.num_top))
        return [unpack_row(ints, floats) for ints, floats in zip(rows.tolist(), rows.view("<f4").tolist(), strict=True)]


def num_words(num_top: int) -> int:
    """Words of one row."""
    return HEAD + 2 * num_top


def trim(reports: Words, num_top: int) -> Words:
    """Rows with no more than ``num_top`` of their most likely tokens."""
    values = HEAD + (reports.shape[1] - HEAD) // 2
    return np.concatenate((reports[:, : HEAD + num_top], reports[:, values : values + num_top]), 1)


def unpack_row(ints: list[int], floats: list[float]) -> dict[int, Logprob]:
    """A row's words, as integers and as float32."""
    num_top = (len(ints) - HEAD) // 2
    token_id, rank = ints[:2]
    entries = {token_id: Logprob(floats[2], rank)}
    for place in range(num_top):
        top_id = ints[HEAD + place]
        if top_id >= 0 and top_id != token_id:  # the vocabulary may be smaller than num_top
            entries[top_id] = Logprob(floats[HEAD + num_top + place], place + 1)
    return entries


def check_size(params: SamplingParams, num_prompt_tokens: int) -> None:
    """Refuse prompts whose log-probabilities are too much for one message.

    Raises:
        InvalidRequestError: names prompt_logprobs.
    """
    if params.prompt_logprobs is None:
        return
    size = 4 * num_words(params.prompt_logprobs) * num_prompt_tokens
    if size > MAX_BYTES:
        raise InvalidRequestError(
            f"prompt_logprobs is {params.prompt_logprobs}, which makes {size:,} bytes for a prompt of "
            f"{num_prompt_tokens:,} tokens, and {MAX_BYTES:,} is the most; lower it or shorten the prompt",
            "prompt_logprobs",
        )
