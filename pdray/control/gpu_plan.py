"""Assignment of workers to GPUs. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

from pdray.config import Config
from pdray.gpu_settings import num_ranks

UNITS = 10_000  # of a GPU, as Ray counts


class GpuBundle(NamedTuple):
    """A part of one physical GPU, or all of it, and who gets it; or the GPUs of one host that one worker gets.

    Attributes:
        shares: by worker, of a GPU, in whole units; together at most 1, unless it is one worker's alone.
        device_id: which GPU it must be; None: any.
    """

    shares: dict[str, float]
    device_id: int | None

    @property
    def num_gpus(self) -> float:
        return round(sum(self.shares.values()) * UNITS) / UNITS


def plan_gpus(config: Config) -> list[GpuBundle]:
    """One bundle for each GPU: those of the devices that are named, then as few more as the other workers fill.

    A worker of several ranks has a bundle of its own, with a GPU for each.

    Prefill workers come first, so that they share with decode workers only where there is room left: one of each with
    half a GPU share one; one with a whole GPU and two with halves need two.
    """
    bundles: list[GpuBundle] = []
    for worker_id, share, device_id in _workers(config):
        for bundle in bundles:
            if bundle.device_id == device_id and round((bundle.num_gpus + share) * UNITS) <= UNITS:
                bundle.shares[worker_id] = share
                break
        else:
            bundles.append(GpuBundle({worker_id: share}, device_id))
    return sorted(bundles, key=lambda bundle: bundle.device_id is None)


def _workers(config: Config) -> list[tuple[str, float, int | None]]:
    """Name, share and device id of each."""
    roles = [("decode", config.num_decode_workers, config.decode_num_gpus, config.decode_device_ids)]
    if config.mode == "disaggregated":
        roles.insert(0, ("prefill", config.num_prefill_workers, config.prefill_num_gpus, config.prefill_device_ids))
    return [
        (
            f"{role}-{index}",
            num_ranks(config, role) * math.floor(share * UNITS + 1e-6) / UNITS,
            None if device_ids is None else device_ids[index],
        )
        for role, count, share, device_ids in roles
        for index in range(count)
    ]
