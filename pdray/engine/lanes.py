"""An engine's limits and its lane, the same on every rank of a worker."""

from __future__ import annotations

from pdray.config import Config
from pdray.engine.kv.pool import KVPool
from pdray.engine.kv.sizing import usable_model_len
from pdray.engine.ranks.orders import LaneRanks
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.step.lane import Lane
from pdray.models.load import LoadedModel


def engine_limits(config: Config, model: LoadedModel, pool: KVPool) -> EngineLimits:
    """What the configuration, the model and the pool allow.

    Args:
        config: for the pool's device; see Config.for_device().
    """
    block_size, num_blocks = pool.layout.block_size, pool.num_blocks
    return EngineLimits(
        block_size=block_size,
        num_blocks=num_blocks - 1,
        max_model_len=usable_model_len(model.decoder.max_len, num_blocks, block_size),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        headroom_tokens=config.decode_headroom_tokens,
        vocab_size=model.config.vocab_size,
        eos_token_ids=model.config.eos_token_ids,
    )


def make_lane(
    config: Config, model: LoadedModel, pool: KVPool, limits: EngineLimits, ranks: LaneRanks | None = None
) -> Lane:
    """The lane of every step, with its graphs. All ranks must make theirs at the same time."""
    return Lane(
        model.decoder,
        pool,
        limits,
        largest_group=config.transfer_layer_group,
        capture=pool.device.type == "cuda" and not config.enforce_eager,
        ranks=ranks,
    )
