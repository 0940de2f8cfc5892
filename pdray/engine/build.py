"""Build a pool of the right size, and an engine over it, from a configuration and a model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from pdray.config import Config
from pdray.engine.engine import Engine
from pdray.engine.kv.layout import KVLayout
from pdray.engine.kv.pool import KVPool
from pdray.engine.kv.sizing import WHOLE_GPU, GpuRoom, choose_num_blocks
from pdray.engine.mux.engine import MuxEngine, wanted_sizes
from pdray.engine.mux.partitions import PIECE_TOKENS
from pdray.engine.ranks.orders import LaneRanks
from pdray.engine.step.profile import profile_model
from pdray.kernels.collective.group import RankGroup
from pdray.kernels.green_context import open_splits
from pdray.models.halves import reserve_halves
from pdray.models.load import LoadedModel

logger = logging.getLogger(__name__)


class PoolPlace(NamedTuple):
    """Where a pool lies, and what it must leave of its device.

    Attributes:
        spare_bytes, memory: see KVPool.allocate().
        room: for a pool whose size is measured.
    """

    spare_bytes: int = 0
    memory: Callable[[int], torch.Tensor] | None = None
    room: GpuRoom = WHOLE_GPU


ANYWHERE = PoolPlace()


def make_pool(config: Config, model: LoadedModel, device: torch.device, place: PoolPlace = ANYWHERE) -> KVPool:
    """A pool as large as the configuration says, or as the device allows; of several ranks, each has as many blocks.

    Raises:
        OutOfMemoryError: the measured pool cannot hold one sequence of max_model_len.
    """
    config = config.for_device(device.type)
    if model.decoder.group is not None:  # before what is free is measured
        row_bytes = model.config.hidden_size * model.dtype.itemsize
        reserve_halves(model.decoder.group, config.max_num_batched_tokens, row_bytes)
    layout = KVLayout.of(model.config, config.block_size, model.dtype, model.decoder.num_ranks)
    num_blocks = choose_num_blocks(
        config,
        layout,
        device,
        model.decoder.max_len,
        room=place.room,
        num_ranks=model.decoder.num_ranks,
        profile=lambda: profile_model(_largest(config), model.decoder),
    )
    if model.decoder.group is not None:
        num_blocks = smallest(model.decoder.group, num_blocks, device)
    return KVPool.allocate(layout, num_blocks, device, spare_bytes=place.spare_bytes, memory=place.memory)


def build_engine(
    config: Config,
    model: LoadedModel,
    device: torch.device,
    place: PoolPlace = ANYWHERE,
    ranks: LaneRanks | None = None,
) -> Engine:
    """An engine with a pool of its own; see make_pool(). With sm_partition one of two lanes.

    "auto" is "off" on a device without partitions, and where throughput alone counts; one line of the log says so.

    Args:
        ranks: those that share the model with this process, which is rank 0.
    """
    if config.sm_partition == "auto" and config.target_tpot_ms == 0:
        logger.warning("sm_partition auto is off: with target_tpot_ms 0 one step of prompts and decodes computes most")
        config = config.model_copy(update={"sm_partition": "off", "decode_sms": None, "target_ttft_ms": None})
    pool = make_pool(config, model, device, place)
    if config.sm_partition == "off":
        return Engine(config, model, pool, ranks=ranks)
    splits = open_splits(pool.device, wanted_sizes(config))
    if config.sm_partition == "auto" and splits[0].unavailable is not None:
        return Engine(config, model, pool)
    return MuxEngine(config, model, pool, splits=splits)


def smallest(group: RankGroup, number: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers."""
    mine = torch.tensor([number], dtype=torch.int64, device=device)
    numbers = group.gather(mine)
    if numbers is not None:
        mine = torch.stack(numbers).amin(0)
    group.broadcast(mine)
    return int(mine.item())


def _largest(config: Config) -> Config:
    """The configuration of a step that takes as much memory as all that run at once, and their graphs."""
    if config.sm_partition == "off":
        return config
    tokens = config.max_num_batched_tokens + len(wanted_sizes(config)) * PIECE_TOKENS
    return config.model_copy(update={"max_num_batched_tokens": tokens})
