"""What a sequence's draws know of its tokens, kept on the device: one word for each token of the vocabulary.

A word counts how often the token was drawn, and says whether the prompt has it, whether it ends the sequence, and what
is added to its logit: a place among the slot's biases, which stand before the words, the first one next to them. A
sequence's words are written once, when it joins, however long it is; from then on each draw adds its own token. So a
step's work does not grow with the prompt, and the host need not know a token before the next one is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BIAS_SHIFT = 20
COUNT, PROMPT, END = (1 << BIAS_SHIFT) - 1, 1 << 30, -(1 << 31)  # bits of a word
BIASES = 1 << 10  # words of a slot before its first token's; of a word, the bits between COUNT and PROMPT are a place
BIAS = (BIASES - 1) << BIAS_SHIFT
HEADER = 8  # words of a join: slot, and where its parts start and stop; see pack_joins()

Ids = Sequence[int] | np.ndarray[Any, Any]


class Join(NamedTuple):
    """A sequence that is to be remembered in ``slot``, in place of what was there.

    Attributes:
        prompt, outputs, ends: token ids, repeated ones too: of the prompt, drawn so far, and that end it. No token
            may be drawn more than COUNT times.
        bias: what is added to logits, by token id; fewer than BIASES different numbers.
    """

    slot: int
    prompt: Ids
    outputs: Ids
    ends: Ids
    bias: Mapping[int, float] | None = None


class Joins(NamedTuple):
    """Several sequences' ids in one tensor, to be copied to the device.

    Attributes:
        words: [N] int32: num headers of HEADER words, then their parts. num: of sequences. longest: of all parts of
            one of them.
    """

    words: Tensor
    num: int
    longest: int


def no_history(num_slots: int, vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """[num_slots, BIASES + vocab_size] int32: slots of sequences without tokens."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.zeros((num_slots, BIASES + vocab_size), dtype=np.int32))  # takes no memory yet
    return torch.zeros(num_slots, BIASES + vocab_size, dtype=torch.int32, device=device)


def pack_joins(joins: Sequence[Join], *, pin_memory: bool = False) -> Joins:
    """On the host, pinned if asked for. Parts: prompt, outputs, ends; ids with a bias, their places, the biases."""
    all_parts = [_parts(join) for join in joins]
    lengths = [sum(map(len, parts)) for parts in all_parts]
    words = torch.empty(len(joins) * HEADER + sum(lengths), dtype=torch.int32, pin_memory=pin_memory)
    array = words.numpy()
    at = len(joins) * HEADER
    for i, (join, parts) in enumerate(zip(joins, all_parts, strict=True)):
        stops = at + np.cumsum([len(part) for part in parts])
        array[i * HEADER : (i + 1) * HEADER] = [join.slot, at, *stops]
        for part, stop in zip(parts, stops, strict=True):
            array[at:stop] = part
            at = stop
    return Joins(words, len(joins), max(lengths, default=0))


def _parts(join: Join) -> list[Ids]:
    bias = join.bias or {}
    values = np.array(sorted(set(bias.values())), dtype=np.float32)
    if len(values) >= BIASES:
        raise ValueError(f"logit_bias has {len(values)} different numbers; it may have at most {BIASES - 1}")
    places = 1 + np.searchsorted(values, np.array(list(bias.values()), dtype=np.float32))
    return [join.prompt, join.outputs, join.ends, list(bias), places, values.view(np.int32)]


def remember(history: Tensor, joins: Joins) -> None:
    """Write the sequences' words into their slots. On CUDA the host waits for nothing.

    Args:
        history: as of no_history(). joins: on the host, with slots below H and ids of the vocabulary.
    """
    if history.is_cuda:
        from pdray.kernels.sampling.history_triton import triton_remember

        return triton_remember(history, joins._replace(words=joins.words.to(history.device, non_blocking=True)))
    array, words = history.numpy(), joins.words.numpy()
    for i in range(joins.num):
        slot, start, *stops = words[i * HEADER : (i + 1) * HEADER]
        bounds = zip((start, *stops), stops, strict=False)
        prompt, outputs, ends, biased, places, biases = (words[a:b] for a, b in bounds)
        array[slot] = 0
        row = array[slot, BIASES:]
        np.add.at(row, outputs, 1)
        row[prompt] |= PROMPT
        row[ends] |= END
        row[biased] |= places << BIAS_SHIFT
        array[slot, BIASES - len(biases) : BIASES] = biases[::-1]


def biased_tokens(row: np.ndarray[Any, np.dtype[np.int32]]) -> tuple[Any, Any]:
    """Ids [K] of a slot's tokens with a bias, and the float32 numbers [K] that are added to their logits."""
    places = (row[BIASES:] & BIAS) >> BIAS_SHIFT
    token_ids = np.flatnonzero(places)
    return token_ids, row[BIASES - places[token_ids]].view(np.float32)
