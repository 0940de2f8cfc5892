"""What a rank's process is told when it starts, and how the ranks of a worker find each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pdray.config import Config

if TYPE_CHECKING:
    import torch

    from pdray.kernels.collective.group import RankGroup


class Setup(msgspec.Struct, frozen=True):
    """Attributes:
    settings: fields of the Config that were given, as JSON; no API key is among them.
    unique_id: of the NCCL communicator, as cupy has it; None: the ranks run on CPU.
    """

    settings: str
    rank: int
    size: int
    unique_id: bytes | tuple[int, ...] | None

    @property
    def config(self) -> Config:
        return Config.model_validate_json(self.settings)


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Setup).decode


def settings_of(config: Config) -> str:
    """What Setup.config is made from: the same fields count as given."""
    return config.model_dump_json(exclude_unset=True)


def join(setup: Setup, store_fd: int, device: torch.device) -> RankGroup:
    """This process as a rank of its group. Blocks until all are there.

    Args:
        store_fd: of a file in memory that the ranks have in common, and that nothing else is written to.
    """
    if setup.unique_id is not None:
        from pdray.kernels.collective.nccl import NcclGroup

        return NcclGroup(setup.rank, setup.size, setup.unique_id, device)
    from pdray.kernels.collective.gloo import GlooGroup

    return GlooGroup(setup.rank, setup.size, f"/proc/self/fd/{store_fd}")
