"""What a rank's process is told when it starts, and how the ranks of a worker find each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pdray.config import Config

if TYPE_CHECKING:
    import torch

    from pdray.kernels.collective.group import RankGroup


class RankSite(msgspec.Struct, frozen=True):
    """What rank 0's channel kinds are made from, for the same kinds of another rank; see pdray.transfer.channel.Site.

    Attributes:
        kinds: their names. spare_bytes: see KVPool.allocate().
    """

    worker_id: str
    num_peers: int
    address: str
    kinds: list[str]
    spare_bytes: int
    sends: bool = False
    num_peer_ranks: int = 1


class Setup(msgspec.Struct, frozen=True):
    """Attributes:
    settings: fields of the Config that were given, as JSON; no API key is among them.
    unique_id: of the NCCL communicator, as cupy has it; None: the ranks run on CPU.
    store_file: by which they find each other then: a path where nothing is yet.
    halves_bytes: see RankGroup.
    site: of its channel kinds; None: there are none.
    """

    settings: str
    rank: int
    size: int
    unique_id: bytes | tuple[int, ...] | None
    store_file: str
    halves_bytes: int
    site: RankSite | None = None

    @property
    def config(self) -> Config:
        return Config.model_validate_json(self.settings)


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Setup).decode


def settings_of(config: Config) -> str:
    """What Setup.config is made from: the same fields count as given."""
    return config.model_dump_json(exclude_unset=True)


def join(setup: Setup, device: torch.device) -> RankGroup:
    """This process as a rank of its group. Blocks until all are there; rank 0, until none needs the file any more."""
    group = _join(setup, device)
    group.halves_bytes = setup.halves_bytes
    return group


def _join(setup: Setup, device: torch.device) -> RankGroup:
    if setup.unique_id is not None:
        from pdray.kernels.collective.nccl import NcclGroup
        from pdray.kernels.crossover import ONE_SHOT_MAX_BYTES

        one_shot_bytes = 0 if setup.config.disable_custom_all_reduce else ONE_SHOT_MAX_BYTES
        return NcclGroup(setup.rank, setup.size, setup.unique_id, device, one_shot_bytes)
    import torch

    from pdray.kernels.collective.gloo import GlooGroup

    group = GlooGroup(setup.rank, setup.size, setup.store_file)
    group.gather(torch.zeros(1))
    return group
