"""Masks of a step's draws: filled on the host, sent to the device, read there by the kernels.

Within a string of any length the next mask is the last one again. Such a mask stays where it is on the device, and only
those that are others than before are filled and sent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pdray.kernels.sampling.mask import num_mask_words


class MaskBuffer:
    """For two steps at a time: when masks are filled, the step before the last one has been read, and has used its own.

    Attributes:
        words: [max_num_seqs, num_mask_words(vocab_size)] int32 on the device; see TokenMasks.
        kept: by row of ``words``, what stands for the mask that it holds, to be compared by identity; None: nothing.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        shape, on_gpu = (max_num_seqs, num_mask_words(vocab_size)), device.type == "cuda"
        self.words = torch.zeros(shape, dtype=torch.int32, device=device)
        self.kept: list[object | None] = [None] * max_num_seqs
        self._hosts = [torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2 if on_gpu else 1)]
        self._host_rows = [torch.zeros(max_num_seqs, dtype=torch.int64, pin_memory=on_gpu) for _ in self._hosts]
        self._sent = torch.zeros(shape, dtype=torch.int32, device=device) if on_gpu else self._hosts[0]
        self._rows = torch.zeros(max_num_seqs, dtype=torch.int64, device=device) if on_gpu else self._host_rows[0]
        self._changes: list[tuple[int, object | None]] = []

    @property
    def host(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Room for the masks that the next step needs and the device does not have yet. Pinned on CUDA, where there are
        two."""
        host: np.ndarray[Any, np.dtype[np.int32]] = self._hosts[0].numpy()
        return host

    def change(self, changes: list[tuple[int, object | None]]) -> None:
        """What send() is to do.

        Args:
            changes: for each mask in ``host`` from the first on, its row of ``words``, and what it will be known by.
        """
        self._changes = changes

    def send(self) -> None:
        """Change ``words``, on the current stream. The host does not wait."""
        changes, self._changes = self._changes, []
        num = len(changes)
        if not num:
            return
        on_gpu, host = self._sent is not self._hosts[0], self._hosts[0][:num]
        if changes[-1][0] == num - 1:  # they are in order, so these are the first ones, all of them
            self.words[:num].copy_(host, non_blocking=True)
        else:
            rows, sent = self._rows[:num], self._sent[:num]
            self._host_rows[0].numpy()[:num] = [row for row, _ in changes]
            if on_gpu:
                rows.copy_(self._host_rows[0][:num], non_blocking=True)
                sent.copy_(host, non_blocking=True)
            self.words.index_copy_(0, rows, sent)
        for row, known_by in changes:
            self.kept[row] = known_by
        if on_gpu:
            self._hosts.reverse()
            self._host_rows.reverse()
