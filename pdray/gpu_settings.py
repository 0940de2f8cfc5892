"""Checks of a configuration's GPUs: which ones workers get, and how many share a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pdray.errors import ConfigError
from pdray.transfer.registry import ranks_obstacle

if TYPE_CHECKING:
    from pdray.config import Config

ROLES = ("prefill", "decode")
# Settings that workers of both roles do not have, and what they have instead.
OF_COLOCATED = {
    "num_prefill_workers": "num_decode_workers",
    "prefill_num_gpus": "decode_num_gpus",
    "prefill_device_id": "decode_device_id",
    "prefill_tensor_parallel_size": "tensor_parallel_size",
    "decode_tensor_parallel_size": "tensor_parallel_size",
}


def check_device_ids(config: Config) -> None:
    """Raises:
    ValueError: the GPUs that are named are not one for each worker, or hold too much.
    """
    used: dict[int, float] = {}
    for role, count in (("prefill", config.num_prefill_workers), ("decode", config.num_decode_workers)):
        ids, name = getattr(config, f"{role}_device_ids"), f"{role}_device_id"
        if ids is None:
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


def check_colocated(config: Config) -> None:
    """Raises:
    ValueError: mode is colocated, and a setting is given of one role alone.
    """
    for name, instead in OF_COLOCATED.items() if config.mode == "colocated" else ():
        if (value := getattr(config, name)) != type(config).model_fields[name].default:
            raise ValueError(f"{name} is {value}, but mode is colocated, and every worker does both; set {instead}")


def as_colocated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields of Config for workers of both roles, as large as those that decode."""
    common = {name: value for name, value in settings.items() if name not in OF_COLOCATED}
    num_ranks = settings.get("decode_tensor_parallel_size")
    return common | ({} if num_ranks is None else {"tensor_parallel_size": num_ranks}) | {"mode": "colocated"}


def num_ranks(config: Config, role: str) -> int:
    """Processes that share the model of each "prefill" or "decode" worker; the latter is any that is colocated."""
    return int(getattr(config, ranks_setting(config, role)))


def ranks_setting(config: Config, role: str) -> str:
    """The setting that num_ranks() comes from."""
    own = f"{role}_tensor_parallel_size"
    return "tensor_parallel_size" if getattr(config, own) is None else own


def has_ranks(config: Config) -> bool:
    """Whether prefill or decode workers have several."""
    return any(num_ranks(config, role) > 1 for role in _roles(config))


def require_one_rank(config: Config, command: str) -> None:
    """Raises:
    ConfigError: several ranks are asked for, and the command measures in this process alone.
    """
    for role in ROLES:
        if (size := num_ranks(config, role)) > 1:
            setting = ranks_setting(config, role)
            raise ConfigError(f"{setting} is {size}, but {command} measures one rank, on one GPU; remove {setting}")


def of_role(config: Config, role: str) -> Config:
    """What a worker of that role runs with: the same, but that tensor_parallel_size is its own."""
    if config.mode == "colocated":
        return config
    others = {f"{each}_tensor_parallel_size": num_ranks(config, each) for each in ROLES if each != role}
    own = {"tensor_parallel_size": num_ranks(config, role), f"{role}_tensor_parallel_size": None}
    return config.model_copy(update=others | own)


def check_ranks(config: Config) -> None:
    """Raises:
    ValueError: something else is asked for that workers of several ranks do not do.
    """
    if has_ranks(config) and (obstacle := ranks_obstacle(config.channel)) is not None:
        sizes = {ranks_setting(config, role): num_ranks(config, role) for role in ROLES}
        asked = ", ".join(f"{setting} is {size}" for setting, size in sizes.items())
        raise ValueError(f"channel is {config.channel}, but {obstacle}, and {asked}; set channel to auto")
    for role in _roles(config):
        if (size := num_ranks(config, role)) > 1:
            _check_role(config, role, f"{ranks_setting(config, role)} is {size}")


def _roles(config: Config) -> tuple[str, ...]:
    return ("decode",) if config.mode == "colocated" else ROLES


def _check_role(config: Config, role: str, asked: str) -> None:
    if config.sm_partition != "off":
        raise ValueError(
            f"sm_partition is {config.sm_partition}, which divides one GPU, but {asked}; set sm_partition to off"
        )
    if role == "decode" and config.decode_pipeline != "off":
        raise ValueError(
            f"decode_pipeline is {config.decode_pipeline}, but {asked}, and ranks run plain steps; set decode_pipeline "
            "to off"
        )
    if getattr(config, f"{role}_device_id") is not None:
        raise ValueError(
            f"{role}_device_id names one GPU for each worker, but {asked}; remove it, and start Ray with the GPUs that "
            "workers may use in CUDA_VISIBLE_DEVICES"
        )
    if (share := getattr(config, f"{role}_num_gpus")) != 1:
        raise ValueError(f"{role}_num_gpus is {share}, but {asked}, which takes whole GPUs; remove {role}_num_gpus")
