"""How a worker process comes by its device, its channels and its engine, and what it logs of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pdray.actors.lending import build_guest, build_lender, lends
from pdray.actors.placement import listen_address
from pdray.config import Config
from pdray.control.guests import KIND, plan_guests
from pdray.errors import RankDiedError
from pdray.gpu_settings import has_ranks, num_ranks, of_role, ranks_setting
from pdray.transfer.registry import allowed_kinds, load_kind
from pdray.wire.cluster_view import Lent, WorkerInfo
from pdray.wire.peers import Role

if TYPE_CHECKING:
    import torch

    from pdray.engine.engine import Engine
    from pdray.ranks.leader import Leader
    from pdray.ranks.setup import RankSite
    from pdray.transfer.channel import Kind, Site

logger = logging.getLogger(__name__)


class Assembly(NamedTuple):
    """Attributes:
    device: that the worker runs on. kinds: of channels, by name. engine: warmed up.
    lent: what guests can map of its memory.
    leader: of the processes that share the model with this one; None: there are none.
    """

    device: torch.device
    kinds: dict[str, Kind]
    engine: Engine
    lent: Lent | None = None
    leader: Leader | None = None


def assemble(
    config: Config,
    role: Role,
    worker_id: str,
    on_fatal: Callable[[BaseException], None],
    on_rank_end: Callable[[RankDiedError], object],
    lender: WorkerInfo | None = None,
) -> Assembly:
    """Choose the device, take every channel kind's memory there, load the model and build the engine.

    Whatever synchronises the device or takes its memory is done here, before any channel is open. Takes seconds to
    minutes; not for the event loop's thread.

    Args:
        on_fatal: see pdray.transfer.channel.Site. on_rank_end: see Leader; then this may never return.
        lender: the decode worker whose guest this one is to be. If that lends nothing, it has memory of its own.

    Raises:
        TransferError: the lender's memory cannot be mapped here.
    """
    import torch

    from pdray.engine.build import PoolPlace, build_engine
    from pdray.engine.device import select_device
    from pdray.engine.kv.sizing import GpuRoom
    from pdray.models import load_model

    device = select_device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads)
    side = "prefill" if role is Role.PREFILL else "decode"
    setting, config = ranks_setting(config, side), of_role(config, side)
    if role is Role.PREFILL:
        config = config.model_copy(update={"decode_pipeline": "off"})  # it decodes nothing
    site = _site(config, role, worker_id, device, on_fatal)
    lent: Lent | None = None
    leader: Leader | None = None
    if lender is not None and lender.lends is not None:
        kinds = _make_kinds([KIND], site)
        engine = build_guest(config, device, lender)
    elif role is Role.DECODE and lends(config, worker_id, device):
        only_guests = len(plan_guests(config)) == config.num_prefill_workers
        kinds = _make_kinds([KIND] if only_guests else allowed_kinds(config.channel), site)
        engine, lent = build_lender(config, worker_id, device, _spare_bytes(kinds))
    else:
        names = [] if config.mode == "colocated" else allowed_kinds(config.channel, has_ranks=has_ranks(config))
        kinds = _make_kinds(names, site)
        share = config.prefill_num_gpus if role is Role.PREFILL else config.decode_num_gpus
        spare_bytes = _spare_bytes(kinds) if role is Role.DECODE else 0
        place = PoolPlace(spare_bytes, room=GpuRoom(share))
        leader = _make_leader(config, device, on_rank_end, setting, _rank_site(site, list(kinds), spare_bytes))
        group, ranks = (None, None) if leader is None else (leader.group, leader.ranks)
        engine = build_engine(config, load_model(config, device, group=group), device, place, ranks)
    _attach(kinds, engine, leader)
    return Assembly(device, kinds, engine, lent, leader)


def _attach(kinds: dict[str, Kind], engine: Engine, leader: Leader | None) -> None:
    from pdray.transfer.channel import WorkerRanks

    pool, ranks = engine.pool, None
    if leader is not None and kinds:
        model = engine.model.config
        ranks = WorkerRanks(leader.open_pools(pool, model), model.num_kv_heads, list(leader.others))
    for kind in kinds.values():
        if ranks is None:
            kind.attach(pool)
        else:
            kind.attach_ranks(pool, ranks)


def _make_leader(
    config: Config, device: torch.device, on_rank_end: Callable[[RankDiedError], object], setting: str, site: RankSite
) -> Leader | None:
    if config.tensor_parallel_size == 1:
        return None
    from pdray.ranks.leader import Leader, check_model

    check_model(config, setting)
    return Leader(config, device, on_rank_end, site)


def _rank_site(site: Site, kinds: list[str], spare_bytes: int) -> RankSite:
    """The same for another rank.

    Args:
        kinds: names of channel kinds. spare_bytes: of rank 0's pool.
    """
    from pdray.ranks.setup import RankSite

    peers = site.sends, site.num_peer_ranks
    return RankSite(site.worker_id, site.num_peers, site.address, kinds, spare_bytes, *peers)


def _spare_bytes(kinds: dict[str, Kind]) -> int:
    return max((kind.spare_bytes for kind in kinds.values()), default=0)


def _make_kinds(names: list[str], site: Site) -> dict[str, Kind]:
    """They take their memory of the device: before the pool is sized."""
    return {name: load_kind(name)(site) for name in names}


def _site(
    config: Config, role: Role, worker_id: str, device: torch.device, on_fatal: Callable[[BaseException], None]
) -> Site:
    from pdray.transfer.channel import Site

    sends = role is Role.PREFILL
    num_peers = config.num_decode_workers if sends else 1
    num_peer_ranks = num_ranks(config, "decode" if sends else "prefill")
    return Site(config, worker_id, device, num_peers, on_fatal, listen_address(config).dial, sends, num_peer_ranks)


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
