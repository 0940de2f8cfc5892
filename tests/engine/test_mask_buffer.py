"""What a step's masks are on the device, however they come there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pdray.engine.step import mask_buffer
from pdray.engine.step.mask_buffer import MAX_WITHIN, MaskBuffer

VOCAB_SIZE, NUM_ROWS = 150, 8
Words = np.ndarray[Any, np.dtype[np.int32]]


def test_rows_hold_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the pool is too small for all masks that come again."""
    monkeypatch.setattr(mask_buffer, "POOL_BYTES", 0)
    rng = np.random.default_rng(0)
    buffer = MaskBuffer(NUM_ROWS, VOCAB_SIZE, torch.device("cpu"))
    width = buffer.words.shape[1]

    def make() -> Words:
        return rng.integers(-(2**31), 2**31, width).astype(np.int32)

    known = [make() for _ in range(3 * (2 * NUM_ROWS + MAX_WITHIN))]
    limits, num_sent, num_known = [make() for _ in range(20)], 0, 0
    for _ in range(300):
        expected, kept = [], []
        buffer.begin()
        for _ in range(int(rng.integers(1, NUM_ROWS + 1))):
            kind = rng.integers(4)
            if kind == 0:
                buffer.add_all()
                expected.append(np.full(width, -1, np.int32))
            elif kind == 1:
                words, filled = make(), buffer.add_own()
                buffer.host[filled] = words
                expected.append(words)
                if rng.random() < 0.5:
                    kept.append((filled, words))
            else:
                words = known[min(int(rng.exponential(40)), len(known) - 1)]
                limit = limits[int(rng.integers(20))] if kind == 2 else None
                buffer.add_known(words, limit)
                expected.append(words if limit is None else words & limit)
                num_known += 1
        for filled, words in kept:
            buffer.keep(filled, words)
            known[int(rng.integers(40))] = words
        num_sent += buffer.num_to_send
        buffer.send()
        assert (buffer.words[: len(expected)].numpy() == np.stack(expected)).all()
    assert len(buffer._known) <= 2 * NUM_ROWS + MAX_WITHIN
    assert num_sent < num_known, "else nothing stays on the device"


def test_masks_of_a_step_that_has_failed_are_sent_later() -> None:
    """Where masks could not be filled, the step draws nothing, and others go on."""
    buffer = MaskBuffer(NUM_ROWS, VOCAB_SIZE, torch.device("cpu"))
    words = np.arange(1, buffer.words.shape[1] + 1, dtype=np.int32)
    for _ in range(2):
        buffer.begin()
        buffer.add_known(words, None)
    buffer.send()
    assert (buffer.words[0].numpy() == words).all()
