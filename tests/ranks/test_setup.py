"""How a rank joins its group: which sums a kernel of ours makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdray.config import Config
from pdray.kernels.crossover import ONE_SHOT_MAX_BYTES
from pdray.ranks.setup import Setup, decode, encode, join, settings_of


@pytest.mark.parametrize(("settings", "most"), [({}, ONE_SHOT_MAX_BYTES), ({"disable_custom_all_reduce": True}, 0)])
@pytest.mark.parametrize("rank", [0, 1])
def test_small_sums_are_left_to_nccl_where_that_is_asked_for(
    settings: dict[str, Any], most: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every rank, by what it is told."""
    joined: list[tuple[Any, ...]] = []
    monkeypatch.setattr("pdray.kernels.collective.nccl.NcclGroup", lambda *args: joined.append(args))
    setup = Setup(settings_of(Config(tensor_parallel_size=2, **settings)), rank, 2, b"id", "")
    join(decode(encode(setup)), torch.device("cuda"))
    assert joined == [(rank, 2, b"id", torch.device("cuda"), most)]
