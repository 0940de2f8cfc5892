"""Workers that share a device: what a decode worker lends of its memory, and how a guest's engine comes to be in it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from pdray.config import Config
from pdray.control.guests import KIND, lent_share, plan_guests
from pdray.errors import ConfigError, HandshakeError, TransferError
from pdray.wire.cluster_view import Lent, WorkerInfo

if TYPE_CHECKING:
    import torch

    from pdray.engine.engine import Engine

logger = logging.getLogger(__name__)


class LentEngine(NamedTuple):
    """An engine, and what others can map of its memory."""

    engine: Engine
    lent: Lent


def lends(config: Config, worker_id: str, device: torch.device) -> bool:
    """Whether this worker has guests, and memory that can be lent.

    Raises:
        ConfigError: it has none, and the channel is not left to choice.
    """
    from pdray.engine.kv.lent_memory import lending_obstacle

    if worker_id not in plan_guests(config).values():
        return False
    obstacle = lending_obstacle(device)
    if obstacle is not None and config.channel == KIND:
        raise ConfigError(f"channel is shared, but {worker_id} cannot lend memory of {device}: {obstacle}")
    if obstacle is not None:
        logger.warning("%s and its prefill workers have memory of their own: %s", worker_id, obstacle)
    return obstacle is None


def build_lender(config: Config, worker_id: str, device: torch.device, spare_bytes: int) -> LentEngine:
    """A decode worker's engine. It has the share of the GPU that its guests would have had, too."""
    from pdray.engine.build import PoolPlace, build_engine
    from pdray.engine.kv.lent_memory import lent_memory
    from pdray.engine.kv.sizing import GpuRoom
    from pdray.models.load import WeightMemory, load_model

    memory = lent_memory(device)
    taken: list[torch.Tensor] = []

    def take(num_bytes: int) -> torch.Tensor:
        taken.append(memory.allocate(num_bytes))
        return taken[-1]

    model = load_model(config, device, WeightMemory(take))
    (weights,) = taken
    share = config.decode_num_gpus + lent_share(config, worker_id)
    room = GpuRoom(share, len(weights), list(plan_guests(config).values()).count(worker_id))
    engine = build_engine(config, model, device, PoolPlace(spare_bytes, memory.allocate, room))
    pool = engine.pool
    num_pool_bytes = pool.num_blocks * pool.layout.block_bytes + spare_bytes
    lent = Lent(host_id(), memory.lend(weights), len(weights), memory.lend(pool.tensor), num_pool_bytes)
    return LentEngine(engine, lent)


def build_guest(config: Config, device: torch.device, lender: WorkerInfo) -> Engine:
    """A prefill worker's engine over its lender's weights and pool.

    Raises:
        TransferError: they cannot be mapped here. HandshakeError: they are another model's.
    """
    from pdray.engine.engine import Engine
    from pdray.engine.kv.layout import KVLayout
    from pdray.engine.kv.lent_memory import lent_memory
    from pdray.engine.kv.pool import KVPool
    from pdray.models.load import WeightMemory, load_model

    memory, lent = lent_memory(device), lender.lends
    assert lent is not None
    if lent.host != host_id():
        raise TransferError(f"{lender.worker_id} runs on another machine; set channel to auto")

    def take(num_bytes: int) -> torch.Tensor:
        if num_bytes != lent.num_weight_bytes:
            raise HandshakeError(
                f"{lender.worker_id}'s weights take {lent.num_weight_bytes} bytes and this model's {num_bytes}: start "
                "both from one configuration"
            )
        return memory.borrow(lent.weights, num_bytes)

    model = load_model(config, device, WeightMemory(take, is_filled=True))
    layout = KVLayout.of(model.config, config.block_size, model.dtype)
    if (mine := f"{model.fingerprint}-{layout}") != lender.fingerprint:
        raise HandshakeError(
            f"{lender.worker_id} ({lender.fingerprint}) and its guest ({mine}) differ in weights, dtype, block size or "
            "KV layout; start both from one configuration"
        )
    pages = memory.borrow(lent.pool, lent.num_pool_bytes)
    return Engine(config, model, KVPool.borrow(layout, lender.num_blocks, pages))


def host_id() -> str:
    """Names the machine, the same for all processes that run on it now."""
    from pdray.transfer.cuda_ipc.transport import BOOT_ID

    return BOOT_ID.read_text().strip()
