"""The scheduler that fits an engine's configuration, model and pool."""

from __future__ import annotations

from pdray.config import Config
from pdray.engine.budget import make_budget
from pdray.engine.kv.allocator import KVAllocator
from pdray.engine.kv.block_pool import BlockPool
from pdray.engine.kv.given_blocks import GivenBlocks
from pdray.engine.kv.pool import KVPool
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.scheduler import Scheduler
from pdray.models.model_config import ModelConfig


def make_scheduler(config: Config, model: ModelConfig, pool: KVPool, max_model_len: int, *, padded: bool) -> Scheduler:
    """Over a borrowed pool it allocates nothing, and caches nothing by itself.

    Args:
        padded: steps are padded to the sizes of CUDA graphs.
    """
    limits = EngineLimits.of(config, model, pool, max_model_len)
    blocks = BlockPool(pool.num_blocks, config.enable_prefix_caching and not pool.borrowed)
    allocator = (GivenBlocks if pool.borrowed else KVAllocator)(limits, blocks)
    return Scheduler(limits, blocks, make_budget(config, model, padded=padded), allocator)
