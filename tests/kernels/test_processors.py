"""Grids follow the partition that is in force, in this thread alone."""

from __future__ import annotations

import threading

import pytest
import torch

from pdray.kernels import processors
from pdray.kernels.processors import limit_processors, num_processors

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def big_device(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """A device of 132 SMs; returns what cuBLAS was told."""
    told: list[int | None] = []
    monkeypatch.setattr(processors, "device_processors", lambda device: 132)
    monkeypatch.setattr(processors, "tell_blas", told.append)
    return told


def test_a_limit_holds_within_and_ends_with_an_error(big_device: list[int | None]) -> None:
    assert num_processors(DEVICE) == 132
    with limit_processors(100):
        assert num_processors(DEVICE) == 100
        with pytest.raises(KeyError), limit_processors(32):
            assert num_processors(DEVICE) == 32
            raise KeyError
        assert num_processors(DEVICE) == 100
        with limit_processors(None):
            assert num_processors(DEVICE) == 132
    assert num_processors(DEVICE) == 132
    assert big_device == [100, 32, 100, None, 100, None]


def test_other_threads_have_the_whole_device() -> None:
    seen: list[int] = []
    with limit_processors(16):
        thread = threading.Thread(target=lambda: seen.append(num_processors(DEVICE)))
        thread.start()
        thread.join()
    assert seen == [132]
