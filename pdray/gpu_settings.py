"""Checks of a configuration's GPUs: which ones workers get, and how many share a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdray.config import Config


def check_device_ids(config: Config) -> None:
    """Raises:
    ValueError: the GPUs that are named are not one for each worker, or hold too much.
    """
    used: dict[int, float] = {}
    for role, count in (("prefill", config.num_prefill_workers), ("decode", config.num_decode_workers)):
        ids, name = getattr(config, f"{role}_device_ids"), f"{role}_device_id"
        if ids is None or (role == "prefill" and config.mode == "colocated"):
            continue
        if config.device == "cpu":
            raise ValueError(f"{name} names a GPU, but device is cpu; remove one of them")
        if len(ids) != count:
            raise ValueError(f"{name} names {len(ids)} GPUs for {count} {role} workers; give one, or one for each")
        for device_id in ids:
            used[device_id] = used.get(device_id, 0.0) + getattr(config, f"{role}_num_gpus")
    for device_id, share in used.items():
        if share > 1 + 1e-6:
            raise ValueError(
                f"GPU {device_id} is to hold {share:g} GPUs' worth of workers; lower prefill_num_gpus or "
                "decode_num_gpus, or name other GPUs in prefill_device_id or decode_device_id"
            )


def check_ranks(config: Config) -> None:
    """Raises:
    ValueError: something else is asked for that workers of several ranks do not do.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return
    if config.mode != "colocated":
        raise ValueError(
            f"tensor_parallel_size is {size}, but mode is {config.mode}, and KV is not yet handed over between workers "
            "of several ranks; set mode to colocated or tensor_parallel_size to 1"
        )
    if config.sm_partition != "off":
        raise ValueError(
            f"sm_partition is {config.sm_partition}, which divides one GPU, but tensor_parallel_size is {size}; "
            "set sm_partition to off"
        )
    if config.decode_pipeline != "off":
        raise ValueError(
            f"decode_pipeline is {config.decode_pipeline}, but tensor_parallel_size is {size}, whose ranks run plain "
            "steps; set decode_pipeline to off"
        )
    if config.decode_device_id is not None:
        raise ValueError(
            f"decode_device_id names one GPU for each worker, but tensor_parallel_size is {size}; remove it, and start "
            "Ray with the GPUs that workers may use in CUDA_VISIBLE_DEVICES"
        )
    if config.decode_num_gpus != 1:
        raise ValueError(
            f"decode_num_gpus is {config.decode_num_gpus}, but tensor_parallel_size is {size}, which takes whole GPUs; "
            "remove decode_num_gpus"
        )
