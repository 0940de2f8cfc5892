"""What a sequence's draws know of its tokens, kept on the device: one word for each token of the vocabulary.

A word counts how often the token was drawn, and says whether the prompt has it, and whether it ends the sequence. A
sequence's words are written once, when it joins, however long it is; from then on each draw adds its own token. So a
step's work does not grow with the prompt, and the host need not know a token before the next one is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PROMPT, END = 1 << 30, 1 << 29  # bits of a word; the others count
COUNT = END - 1
HEADER = 8  # words of a join: slot, where its ids start, where its prompt, outputs and ends stop, and nothing

Ids = Sequence[int] | np.ndarray[Any, Any]


class Join(NamedTuple):
    """A sequence that is to be remembered in ``slot``, in place of what was there.

    Attributes:
        prompt, outputs, ends: token ids, repeated ones too: of the prompt, drawn so far, and that end it.
    """

    slot: int
    prompt: Ids
    outputs: Ids
    ends: Ids


class Joins(NamedTuple):
    """Several sequences' ids in one tensor, to be copied to the device.

    Attributes:
        words: [N] int32: num headers of HEADER words, then ids. num: of sequences. longest: ids of one of them.
    """

    words: Tensor
    num: int
    longest: int


def pack_joins(joins: Sequence[Join], *, pin_memory: bool = False) -> Joins:
    """On the host, pinned if asked for."""
    lengths = [(len(join.prompt), len(join.outputs), len(join.ends)) for join in joins]
    words = torch.empty(len(joins) * HEADER + sum(map(sum, lengths)), dtype=torch.int32, pin_memory=pin_memory)
    array = words.numpy()
    at = len(joins) * HEADER
    for i, (join, parts) in enumerate(zip(joins, lengths, strict=True)):
        stops = at + np.cumsum(parts)
        array[i * HEADER : (i + 1) * HEADER] = [join.slot, at, *stops, 0, 0, 0]
        for ids, stop in zip(join[1:], stops, strict=True):
            array[at:stop] = ids
            at = stop
    return Joins(words, len(joins), max(map(sum, lengths), default=0))


def remember(history: Tensor, joins: Joins) -> None:
    """Write the sequences' words into their slots. On CUDA the host waits for nothing.

    Args:
        history: [H, vocab_size] int32. joins: on the host, with slots below H and ids of the vocabulary.
    """
    if history.is_cuda:
        from pdray.kernels.sampling.history_triton import triton_remember

        return triton_remember(history, joins._replace(words=joins.words.to(history.device, non_blocking=True)))
    array, words = history.numpy(), joins.words.numpy()
    for i in range(joins.num):
        slot, start, *stops = words[i * HEADER : i * HEADER + 5]
        prompt, outputs, ends = (words[a:b] for a, b in zip((start, *stops), stops, strict=False))
        row = array[slot]
        row[:] = 0
        np.add.at(row, outputs, 1)
        row[prompt] |= PROMPT
        row[ends] |= END


def make_mask(allowed: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """[ceil(V / 32)] words of a DrawTable's mask from [V] truths."""
    num_words = -(-len(allowed) // 32)
    bits = np.zeros(num_words * 32, dtype=np.bool_)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.int32)


def bits_of_masks(mask: np.ndarray[Any, Any], vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[V] truths from [ceil(V / 32)] words."""
    return np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little")[:vocab_size].astype(np.bool_)
