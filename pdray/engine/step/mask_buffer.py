"""Masks of a step's draws: on the device, where the kernels read them, and most of them stay there.

Masks that may be met again have slots of a pool on the device. A step names a slot for each draw, and where a run goes
on a second one, whose mask takes away what is too long for it; one gather makes of them what the kernels read. Filled
on the host and sent are only those masks that the pool does not have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pdray.engine.grammar.runs import MOST_LEFT
from pdray.kernels.sampling.mask import num_mask_words

Words = np.ndarray[Any, np.dtype[np.int32]]

POOL_BYTES = 32 << 20
MAX_KNOWN = 4096
MAX_WITHIN = 2 * (MOST_LEFT + 1)  # second masks: of a vocabulary's two runs


class _Slot:
    """words: the mask that it holds, never changed. used: the last step that did. seen: see MaskBuffer._take()."""

    __slots__ = ("index", "seen", "used", "words")

    def __init__(self, words: Words, index: int, step: int) -> None:
        self.words, self.index, self.used, self.seen = words, index, step, step


class _Parts(NamedTuple):
    """Views of one buffer: slots int64, masks [R, W] int32."""

    every: torch.Tensor
    slots: torch.Tensor
    masks: torch.Tensor

    @classmethod
    def of(cls, every: torch.Tensor, num_slots: int, width: int) -> _Parts:
        masks = every[8 * num_slots :].view(torch.int32).view(-1, width)
        return cls(every, every[: 8 * num_slots].view(torch.int64), masks)


class MaskBuffer:
    """For two steps at a time: when masks are filled, the step before the last one has been read, and has used its own.

    Attributes:
        words: [max_num_seqs, num_mask_words(vocab_size)] int32 on the device; see TokenMasks.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        width, on_gpu = num_mask_words(vocab_size), device.type == "cuda"
        self._on_gpu = on_gpu
        num_known = min(MAX_KNOWN, POOL_BYTES // (4 * width))
        self._num_known = max(num_known, 2 * max_num_seqs + MAX_WITHIN)
        shape = max_num_seqs, width
        self.words = torch.zeros(shape, dtype=torch.int32, device=device)
        # A slot for each row's own mask, one that allows everything, and those of known masks.
        self._everything = max_num_seqs
        num_slots = max_num_seqs + 1 + self._num_known
        self._pool = torch.empty(num_slots, width, dtype=torch.int32, device=device)
        self._pool[self._everything] = -1
        self._gathered = torch.empty(2 * max_num_seqs, width, dtype=torch.int32, device=device)
        # What a step sends, in one piece: slots, then masks.
        most, num_slots = max_num_seqs + MAX_WITHIN, 3 * max_num_seqs + MAX_WITHIN
        num_bytes = 8 * num_slots + 4 * most * width
        hosts = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2 if on_gpu else 1)]
        self._hosts = [_Parts.of(each, num_slots, width) for each in hosts]
        sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device) if on_gpu else hosts[0]
        self._sent = _Parts.of(sent, num_slots, width)
        self._known: dict[int, _Slot] = {}  # by id() of their words
        self._step = 0
        self._targets: list[int] = []  # slots, of the first masks in ``host``
        self._bases: list[int] = []  # slots, of the step's masks
        self._limits: list[int] = []  # of what takes away from them
        self._has_limits = False
        self._load()

    def _load(self) -> None:
        """Load what send() needs, before the first step does: CUDA waits for all work to end then."""
        self.begin()
        self.add_own()
        self.add_known(self.host[0].copy(), self.host[0].copy())
        self.send()
        self._known.clear()

    @property
    def host(self) -> Words:
        """Room for the masks that the next step sends, of which the first ones are the caller's. Pinned on CUDA, where
        there are two."""
        host: Words = self._hosts[0].masks.numpy()
        return host

    @property
    def num_to_send(self) -> int:
        """Masks that the device does not have yet."""
        return len(self._targets)

    def begin(self) -> None:
        """The next step's masks begin."""
        if self._bases:  # never sent: the last step failed while its masks were filled
            self._known.clear()
        self._targets, self._bases, self._limits, self._has_limits = [], [], [], False
        self._step += 1

    def add_all(self) -> None:
        """The next draw may be of any token."""
        self._bases.append(self._everything)
        self._limits.append(self._everything)

    def add_own(self) -> int:
        """The next draw's mask will stand in ``host``; returns where."""
        row = len(self._bases)
        self._bases.append(row)
        self._limits.append(self._everything)
        self._targets.append(row)
        return len(self._targets) - 1

    def add_known(self, words: Words, within: Words | None) -> None:
        """The next draw's mask is this one, as far as ``within`` goes. These arrays are never changed."""
        slot = self._known.get(id(words)) or self._send(words)
        slot.used = self._step
        self._bases.append(slot.index)
        if within is None:
            self._limits.append(self._everything)
        else:
            slot = self._known.get(id(within)) or self._send(within)
            slot.used = self._step
            self._has_limits = True
            self._limits.append(slot.index)

    def keep(self, filled: int, words: Words) -> None:
        """A mask that add_own() was for is known by this array from now on."""
        row, slot = self._targets[filled], self._known.get(id(words)) or self._put(words)
        slot.used = self._step
        self._targets[filled] = self._bases[row] = slot.index

    def _send(self, words: Words) -> _Slot:
        self.host[len(self._targets)] = words
        slot = self._put(words)
        self._targets.append(slot.index)
        return slot

    def _put(self, words: Words) -> _Slot:
        self._known[id(words)] = slot = _Slot(words, self._take(), self._step)
        return slot

    def _take(self) -> int:
        """A slot that no mask of this step has: a new one, or that of one that has not been used for a while.

        The oldest one that was not used since it was looked at last; one step's masks are far fewer than there are.
        """
        if len(self._known) < self._num_known:
            return self._everything + 1 + len(self._known)
        while True:
            key = next(iter(self._known))
            slot = self._known.pop(key)
            if slot.used == slot.seen != self._step:
                return slot.index
            slot.seen = slot.used
            self._known[key] = slot

    def send(self) -> None:
        """Change ``words``, on the current stream. The host does not wait."""
        num_sent, num = len(self._targets), len(self._bases)
        if not num:
            return
        host, (every, slots, masks) = self._hosts[0], self._sent
        numbers = [*self._targets, *self._bases, *self._limits] if self._has_limits else [*self._targets, *self._bases]
        host.slots.numpy()[: len(numbers)] = numbers
        if self._on_gpu:
            num_bytes = 8 * len(slots) + 4 * num_sent * masks.shape[1]
            every[:num_bytes].copy_(host.every[:num_bytes], non_blocking=True)
        if num_sent:
            self._pool.index_copy_(0, slots[:num_sent], masks[:num_sent])
        words, shown = self.words[:num], slots[num_sent : len(numbers)]
        if self._has_limits:
            gathered = torch.index_select(self._pool, 0, shown, out=self._gathered[: 2 * num])
            torch.bitwise_and(gathered[:num], gathered[num:], out=words)
        else:
            torch.index_select(self._pool, 0, shown, out=words)
        self._bases, self._limits = [], []
        if self._on_gpu:
            self._hosts.reverse()
