"""Masks of a step's draws: filled on the host, sent to the device in one copy, read there by the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pdray.kernels.sampling.mask import num_mask_words


class MaskBuffer:
    """For two steps at a time: when masks are filled, the step before the last one has been read, and has used its own.

    Attributes:
        host: [max_num_seqs, num_mask_words(vocab_size)] int32; see TokenMasks. Pinned on CUDA, where there are two.
        words: the same on the device; on CPU, the same memory.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        shape, on_gpu = (max_num_seqs, num_mask_words(vocab_size)), device.type == "cuda"
        hosts = [torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2 if on_gpu else 1)]
        self._hosts = hosts
        self.words = torch.zeros(shape, dtype=torch.int32, device=device) if on_gpu else hosts[0]

    @property
    def host(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        host: np.ndarray[Any, np.dtype[np.int32]] = self._hosts[0].numpy()
        return host

    def send(self, num: int) -> None:
        """Copy the first ``num`` masks, on the current stream. The host does not wait."""
        if self.words is not self._hosts[0] and num:
            self.words[:num].copy_(self._hosts[0][:num], non_blocking=True)
            self._hosts.reverse()
