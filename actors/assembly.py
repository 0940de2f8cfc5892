"""How a worker process comes by its device, its channels and its engine, and what it logs of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pdray.actors.placement import listen_address
from pdray.config import Config
from pdray.transfer.registry import allowed_kinds, load_kind
from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.peers import Role

if TYPE_CHECKING:
    import torch

    from pdray.engine.engine import Engine
    from pdray.ranks.leader import Leader
    from pdray.transfer.channel import Kind

logger = logging.getLogger(__name__)


class Assembly(NamedTuple):
    """Attributes:
    device: that the worker runs on. kinds: of channels, by name. engine: warmed up.
    leader: of the processes that share the model with this one; None: there are none.
    """

    device: torch.device
    kinds: dict[str, Kind]
    engine: Engine
    leader: Leader | None


def assemble(
    config: Config,
    role: Role,
    worker_id: str,
    on_fatal: Callable[[BaseException], None],
    on_rank_end: Callable[[BaseException], None],
) -> Assembly:
    """Choose the device, take every channel kind's memory there, load the model and build the engine.

    Whatever synchronises the device or takes its memory is done here, before any channel is open. Takes seconds to
    minutes; not for the event loop's thread.

    Args:
        on_fatal: see pdray.transfer.channel.Site. on_rank_end: see Leader; then this may never return.
    """
    import torch

    from pdray.engine.build import build_engine
    from pdray.engine.device import select_device
    from pdray.models import load_model

    device = select_device(config)
    kinds = _make_kinds(config, role, worker_id, device, on_fatal)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads)
    share = config.prefill_num_gpus if role is Role.PREFILL else config.decode_num_gpus
    lent = [kind.spare_bytes for kind in kinds.values() if role is Role.DECODE]
    leader = _make_leader(config, device, on_rank_end)
    group, ranks = (None, None) if leader is None else (leader.group, leader.ranks)
    model = load_model(config, device, group)
    engine = build_engine(config, model, device, gpu_share=share, spare_bytes=max(lent, default=0), ranks=ranks)
    for kind in kinds.values():
        kind.attach(engine.pool)
    return Assembly(device, kinds, engine, leader)


def _make_leader(config: Config, device: torch.device, on_rank_end: Callable[[BaseException], None]) -> Leader | None:
    if config.tensor_parallel_size == 1:
        return None
    from pdray.ranks.leader import Leader, check_model

    check_model(config)
    return Leader(config, device, on_rank_end)


def _make_kinds(
    config: Config, role: Role, worker_id: str, device: torch.device, on_fatal: Callable[[BaseException], None]
) -> dict[str, Kind]:
    from pdray.transfer.channel import Site

    if config.mode == "colocated":
        return {}
    num_peers = config.num_decode_workers if role is Role.PREFILL else 1
    site = Site(config, worker_id, device, num_peers, on_fatal, listen_address(config).dial)
    return {name: load_kind(name)(site) for name in allowed_kinds(config.channel)}


def log_start(worker: str, config: Config, info: WorkerInfo, dtype: torch.dtype) -> None:
    """Log once which model a process serves, and with which settings.

    Args:
        dtype: of the KV pool.
    """
    given = ", ".join(f"{name}={value!r}" for name, value in config.model_dump(exclude_unset=True).items())
    logger.info(
        "%s: model %s (%s) on %s at %s:%d; KV pool of %d blocks of %d tokens; max_model_len %d, max_num_seqs %d, "
        "max_num_batched_tokens %d; given: %s",
        *(worker, config.model_name, str(dtype).removeprefix("torch."), info.device),
        *(info.host, info.port, info.num_blocks, info.block_size),
        *(info.max_model_len, info.max_num_seqs, info.max_num_batched_tokens, given or "no settings"),
    )
