"""Which prefill workers are guests: they compute in the pool of a decode worker on their device, with its weights.

A guest is started after its lender, and does not outlive it. It has no blocks but those that its lender leases, so that
it serves nobody else. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdray.control.gpu_plan import plan_gpus

if TYPE_CHECKING:
    from pdray.config import Config

KIND = "shared"  # of the channel between the two
LENDER = "decode-0"


def plan_guests(config: Config) -> dict[str, str]:
    """The lender of each guest. With `auto` those that share the GPU of the only decode worker."""
    if config.mode == "colocated" or config.num_decode_workers > 1 or config.channel not in ("auto", KIND):
        return {}
    if config.device == "cpu":
        together = [f"prefill-{i}" for i in range(config.num_prefill_workers)] if config.channel == KIND else []
    else:
        bundle = next(bundle for bundle in plan_gpus(config) if LENDER in bundle.shares)
        together = [worker_id for worker_id in bundle.shares if worker_id != LENDER]
    return dict.fromkeys(together, LENDER)


def why_no_guest(config: Config, worker_id: str) -> str:
    """Why a prefill worker has memory of its own."""
    if config.num_decode_workers > 1:
        return f"there are {config.num_decode_workers} decode workers"
    if worker_id in plan_guests(config):
        return f"{LENDER} lends nothing"
    if config.device == "cpu":
        return "on CPU it must be asked for"
    return f"{LENDER} is on another device"


def lent_share(config: Config, worker_id: str) -> float:
    """Part of a GPU that a lender's guests would have, and leave to it."""
    return config.prefill_num_gpus * list(plan_guests(config).values()).count(worker_id)


def shared_obstacle(config: Config) -> str | None:
    """Why the configured channel cannot be `shared`; None if it can, or is another one."""
    if config.channel != KIND or config.mode == "colocated":
        return None
    if config.num_decode_workers > 1:
        return (
            f"channel is shared, but num_decode_workers is {config.num_decode_workers}, and a prefill worker computes "
            "in the memory of one; set num_decode_workers to 1, or channel to auto"
        )
    if len(plan_guests(config)) < config.num_prefill_workers:
        return (
            f"channel is shared, but {config.num_prefill_workers} prefill workers of {config.prefill_num_gpus:g} GPUs "
            f"and a decode worker of {config.decode_num_gpus:g} do not lie on one GPU; lower prefill_num_gpus and "
            "decode_num_gpus until they add up to at most 1 and name one GPU, or set channel to auto (or device to cpu)"
        )
    return None
