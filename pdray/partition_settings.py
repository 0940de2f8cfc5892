"""Settings that share a GPU's SMs out: what they may be, and which of them go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator

if TYPE_CHECKING:
    from pdray.config import Config

SM_GROUP = 8  # CUDA hands SMs out in multiples of this
DEFAULT_MICRO_BATCHES = 2


def _word(value: object) -> object:
    """YAML reads the words on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]


def check_partition(config: Config) -> None:
    """Settings of sm_partition.

    Raises:
        ValueError: names what to change.
    """
    if config.sm_partition != "off" and config.mode != "colocated":
        raise ValueError(
            f"sm_partition is {config.sm_partition}, but mode is {config.mode}, where no worker both prefills and "
            "decodes; set mode to colocated or sm_partition to off"
        )
    if config.sm_partition == "off" and (config.decode_sms or config.target_ttft_ms):
        name = "decode_sms" if config.decode_sms else "target_ttft_ms"
        raise ValueError(f"{name} is given, but sm_partition is off; set it to on or auto, or remove {name}")


def check_pipeline(config: Config) -> None:
    """Settings of decode_pipeline. It goes with every mode and with sm_partition; check_ranks() refuses it with more
    ranks than one.

    Raises:
        ValueError: names what to change.
    """
    values = {"decode_attention_sm": None, "decode_ffn_sm": None, "decode_micro_batches": DEFAULT_MICRO_BATCHES}
    given = [name for name, default in values.items() if getattr(config, name) != default]
    if config.decode_pipeline == "off":
        if given:
            raise ValueError(f"{given[0]} is given, but decode_pipeline is off; set it to on or auto, or remove it")
        return
    if config.enforce_eager:
        raise ValueError(
            f"decode_pipeline is {config.decode_pipeline}, but enforce_eager leaves out CUDA graphs, without which "
            "launching a step takes longer than the step; remove one of them"
        )
    if config.max_num_seqs == 1:
        raise ValueError(
            f"decode_pipeline is {config.decode_pipeline}, but max_num_seqs is 1, and one sequence makes no two "
            "micro-batches; raise max_num_seqs or set decode_pipeline to off"
        )
    attention, ffn = config.decode_attention_sm, config.decode_ffn_sm
    if attention and ffn and attention % SM_GROUP and ffn % SM_GROUP:
        raise ValueError(
            f"decode_attention_sm is {attention} and decode_ffn_sm {ffn}, but a GPU hands out SMs in multiples of "
            f"{SM_GROUP}; one of them must be one, and the other is the rest of the device"
        )
