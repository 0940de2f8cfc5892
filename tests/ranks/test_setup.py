"""What a rank is told: how to join its group, and what its channel kinds are made from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdray.actors import assembly
from pdray.config import Config
from pdray.kernels.crossover import ONE_SHOT_MAX_BYTES
from pdray.ranks.process import make_kinds
from pdray.ranks.setup import Setup, decode, encode, join, settings_of
from pdray.transfer.channel import Site
from pdray.wire.peers import Role


@pytest.mark.parametrize(("settings", "most"), [({}, ONE_SHOT_MAX_BYTES), ({"disable_custom_all_reduce": True}, 0)])
@pytest.mark.parametrize("rank", [0, 1])
def test_small_sums_are_left_to_nccl_where_that_is_asked_for(
    settings: dict[str, Any], most: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every rank, by what it is told."""
    joined: list[tuple[Any, ...]] = []

    def make_group(*args: Any) -> SimpleNamespace:
        joined.append(args)
        return SimpleNamespace()

    monkeypatch.setattr("pdray.kernels.collective.nccl.NcclGroup", make_group)
    setup = Setup(settings_of(Config(tensor_parallel_size=2, **settings)), rank, 2, b"id", "", 1 << 20)
    group = join(decode(encode(setup)), torch.device("cuda"))
    assert group.halves_bytes == 1 << 20
    assert joined == [(rank, 2, b"id", torch.device("cuda"), most)]


@pytest.mark.parametrize(("role", "expected"), [(Role.PREFILL, (True, 4, 3)), (Role.DECODE, (False, 2, 1))])
def test_every_rank_knows_of_its_peers_what_rank_0_does(
    role: Role, expected: tuple[bool, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it sends, and to or from how many ranks of how many workers."""
    made: list[Site] = []
    monkeypatch.setattr("pdray.ranks.process.load_kind", lambda name: made.append)
    settings: dict[str, Any] = {"prefill_tensor_parallel_size": 2, "decode_tensor_parallel_size": 4}
    config, cpu = Config(num_decode_workers=3, **settings), torch.device("cpu")
    config = assembly.of_role(config, "prefill" if role is Role.PREFILL else "decode")
    site = assembly._site(config, role, "w", cpu, print)
    setup = Setup(settings_of(config), 1, 2, None, "", 1 << 20, assembly._rank_site(site, ["nccl"], 0))
    told = decode(encode(setup))
    assert told.site is not None
    make_kinds(told.site, told.config, cpu)
    for each in (site, *made):
        assert (each.sends, each.num_peer_ranks, each.num_peers, each.worker_id) == (*expected, "w")
    assert len(made) == 1
