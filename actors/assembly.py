"""How a worker process comes by its device, its channels and its engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pdray.actors.placement import listen_address
from pdray.config import Config
from pdray.transfer.registry import allowed_kinds, load_kind
from pdray.wire.peers import Role

if TYPE_CHECKING:
    import torch

    from pdray.engine.engine import Engine
    from pdray.transfer.channel import Kind


class Assembly(NamedTuple):
    """Attributes:
    device: that the worker runs on. kinds: of channels, by name. engine: warmed up.
    """

    device: torch.device
    kinds: dict[str, Kind]
    engine: Engine


def assemble(config: Config, role: Role, worker_id: str, on_fatal: Callable[[BaseException], None]) -> Assembly:
    """Choose the device, take every channel kind's memory there, load the model and build the engine.

    Whatever synchronises the device or takes its memory is done here, before any channel is open. Takes seconds to
    minutes; not for the event loop's thread.

    Args:
        on_fatal: see pdray.transfer.channel.Site.
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
    model = load_model(config, device)
    engine = build_engine(config, model, device, gpu_share=share, spare_bytes=max(lent, default=0))
    for kind in kinds.values():
        kind.attach(engine.pool)
    return Assembly(device, kinds, engine)


def _make_kinds(
    config: Config, role: Role, worker_id: str, device: torch.device, on_fatal: Callable[[BaseException], None]
) -> dict[str, Kind]:
    from pdray.transfer.channel import Site

    if config.mode == "colocated":
        return {}
    num_peers = config.num_decode_workers if role is Role.PREFILL else 1
    site = Site(config, worker_id, device, num_peers, on_fatal, listen_address(config).dial)
    return {name: load_kind(name)(site) for name in allowed_kinds(config.channel)}
