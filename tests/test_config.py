"""What a configuration becomes on a device."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdray.config import Config
from pdray.errors import ConfigError
from pdray.gpu_settings import ROLES, as_colocated, num_ranks, of_role


@pytest.mark.parametrize(
    ("given", "num_seqs", "num_tokens"),
    [
        ({}, 256, 8192),
        ({"max_num_seqs": 64}, 64, 8192),
        ({"max_num_seqs": 1024}, 1024, 8192),
        ({"max_num_batched_tokens": 2048}, 256, 2048),
        ({"max_num_batched_tokens": 100, "max_num_seqs": 8}, 8, 100),
        ({"max_num_batched_tokens": 128}, 128, 128),
        ({"max_num_seqs": 10_000, "max_num_batched_tokens": 10_000}, 10_000, 10_000),
    ],
)
def test_a_gpus_defaults_give_way_to_what_is_given(given: dict[str, int], num_seqs: int, num_tokens: int) -> None:
    config: Config = pickle.loads(pickle.dumps(Config(**given)))  # as Ray hands it to a worker
    on_gpu = config.for_device("cuda")
    assert (on_gpu.max_num_seqs, on_gpu.max_num_batched_tokens) == (num_seqs, num_tokens)
    assert config.for_device("cpu") == config
    differing = {"max_num_seqs", "max_num_batched_tokens", "step_timeout_s"}
    assert on_gpu.model_dump(exclude=differing) == config.model_dump(exclude=differing)


def test_only_a_gpus_steps_have_a_deadline_unless_one_is_given() -> None:
    assert [Config().for_device(device).step_timeout_s for device in ("cpu", "cuda")] == [None, 60]
    assert [Config(step_timeout_s=5).for_device(device).step_timeout_s for device in ("cpu", "cuda")] == [5, 5]


def test_relative_paths_are_this_processs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in other folders. The name in the API stays as it was given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    config = Config(model="models/llama", tokenizer="./models").with_absolute_paths()
    assert config.model == str(tmp_path / "models" / "llama") and config.tokenizer == str(tmp_path / "models")
    assert config.model_name == "models/llama"
    named = Config(model="models/llama", served_model_name="mine").with_absolute_paths()
    assert named.model_name == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config(model="~/models/llama").with_absolute_paths().model == str(tmp_path / "models" / "llama")


@pytest.mark.parametrize("model", ["org/name", "gpt2", "/on/another/node"])
def test_what_is_no_path_here_is_left(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(model=model)
    assert config.with_absolute_paths() is config


@pytest.mark.parametrize("model", ["./llama", "../llama", "~/llama", "llama.gguf", "a/config.json"])
def test_a_relative_path_that_leads_nowhere_is_told(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="model is .* there is no .*must be absolute"):
        Config(model=model, skip_tokenizer_init=True).with_absolute_paths()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"sm_partition": "auto"}, "sm_partition is auto, but mode is disaggregated.*set mode to colocated"),
        ({"sm_partition": "on", "mode": "disaggregated"}, "sm_partition is on, but mode is disaggregated"),
        ({"mode": "colocated", "decode_sms": 32}, "decode_sms is given, but sm_partition is off; set it to on or auto"),
        ({"target_ttft_ms": 32}, "target_ttft_ms is given, but sm_partition is off.*or remove target_ttft_ms"),
        ({"mode": "colocated", "sm_partition": "on", "decode_sms": 0}, "decode_sms"),
        ({"target_ttft_ms": -1}, "target_ttft_ms"),
    ],
)
def test_a_split_that_cannot_be_is_refused(given: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Config(**given)
    Config(mode="colocated", sm_partition="auto", decode_sms=32, target_tpot_ms=8, target_ttft_ms=1000)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"decode_attention_sm": 64}, "decode_attention_sm is given, but decode_pipeline is off; set it to on or auto"),
        ({"decode_ffn_sm": 64}, "decode_ffn_sm is given, but decode_pipeline is off"),
        ({"decode_micro_batches": 3}, "decode_micro_batches is given, but decode_pipeline is off"),
        ({"decode_pipeline": "on", "enforce_eager": True}, "decode_pipeline is on, but enforce_eager"),
        ({"decode_pipeline": "on", "decode_attention_sm": 60, "decode_ffn_sm": 72, "mode": "colocated"}, None),
        ({"decode_pipeline": "auto", "decode_attention_sm": 62, "decode_ffn_sm": 70}, "is 62 and decode_ffn_sm 70"),
        ({"decode_pipeline": "on", "decode_ffn_sm": 4}, "decode_ffn_sm"),
        ({"decode_pipeline": "on", "decode_micro_batches": 1}, "decode_micro_batches"),
        ({"decode_pipeline": "sometimes"}, "decode_pipeline"),
        ({"decode_pipeline": "auto", "max_num_seqs": 1}, "decode_pipeline is auto, but max_num_seqs is 1"),
        ({"decode_pipeline": "auto", "mode": "colocated", "sm_partition": "on", "decode_sms": 32}, None),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(given: dict[str, object], text: str | None) -> None:
    if text is None:
        assert Config(**Config(**given).model_dump()) == Config(**given)
        return
    with pytest.raises(ValueError, match=text):
        Config(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sm_partition": "auto"}, "sm_partition is auto.* set sm_partition to off"),
        ({"decode_pipeline": "auto"}, "decode_pipeline is auto.* set decode_pipeline to off"),
        ({"decode_device_id": 0}, "decode_device_id names one GPU.* remove it"),
        ({"decode_device_id": [0, 1]}, "decode_device_id names one GPU.* remove it"),
        ({"decode_num_gpus": 0.5}, "decode_num_gpus is 0.5.* remove decode_num_gpus"),
        ({"decode_num_gpus": 2}, "decode_num_gpus is 2.* takes whole GPUs; remove decode_num_gpus"),
    ],
)
def test_what_workers_of_several_ranks_do_not_do_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{"mode": "colocated", "tensor_parallel_size": 2} | given)


@pytest.mark.parametrize("name", ["tensor_parallel_size", "decode_num_gpus", "prefill_device_id", "step_timeout_s"])
@pytest.mark.parametrize("value", [True, False])
def test_a_number_is_no_boolean(name: str, value: bool) -> None:
    with pytest.raises(ValueError, match=f"{name}\n.*it is {str(value).lower()}, and must be a number"):
        Config(**{name: value})
    assert Config(mode="colocated", sm_partition=value).sm_partition == ("on" if value else "off")  # type: ignore[arg-type]  # YAML's


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"num_prefill_workers": 2}, "num_decode_workers"),
        ({"prefill_num_gpus": 0.5}, "decode_num_gpus"),
        ({"prefill_device_id": 0}, "decode_device_id"),
        ({"prefill_device_id": [0]}, "decode_device_id"),
        ({"prefill_tensor_parallel_size": 1}, "tensor_parallel_size"),
        ({"decode_tensor_parallel_size": 2}, "tensor_parallel_size"),
    ],
)
def test_a_colocated_mode_has_no_settings_of_one_role(given: dict[str, Any], instead: str) -> None:
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}, but mode is colocated")) as caught:
        Config(mode="colocated", **given)
    assert f"; set {instead} " in str(caught.value)


def test_a_colocated_worker_is_as_large_as_the_one_that_decodes() -> None:
    given = {"num_prefill_workers": 2, "decode_tensor_parallel_size": 2, "prefill_num_gpus": 0.5, "max_num_seqs": 8}
    assert as_colocated(given) == {"mode": "colocated", "tensor_parallel_size": 2, "max_num_seqs": 8}
    assert as_colocated({"tensor_parallel_size": 3}) == {"mode": "colocated", "tensor_parallel_size": 3}


DECODE, PREFILL = {"decode_tensor_parallel_size": 2}, {"prefill_tensor_parallel_size": 2}
ALL_ONE = {"tensor_parallel_size": 2, "prefill_tensor_parallel_size": 1, "decode_tensor_parallel_size": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            DECODE | {"channel": "shared"},
            "shared joins workers of one rank each, and tensor_parallel_size is 1, decode_te",
        ),
        (PREFILL | {"channel": "shared"}, "channel is shared, but .* set channel to auto"),
        (PREFILL | {"channel": "cuda_ipc"}, None),
        (
            {"tensor_parallel_size": 2, "channel": "shared", "device": "cpu"},
            "workers of one rank each, and tensor_parallel_size is 2; set channel to auto",
        ),
        (DECODE | {"decode_pipeline": "auto"}, "decode_pipeline is auto, but decode_tensor_parallel_size is 2"),
        (PREFILL | {"prefill_device_id": 0}, "prefill_device_id names one GPU.*prefill_tensor_parallel_size is 2"),
        (PREFILL | {"prefill_num_gpus": 0.5}, "prefill_num_gpus is 0.5.*remove prefill_num_gpus"),
        (PREFILL | {"decode_num_gpus": 0.5, "decode_device_id": 0, "decode_pipeline": "auto"}, None),
        (DECODE | {"prefill_num_gpus": 0.5, "prefill_device_id": 0, "channel": "object_store"}, None),
        (ALL_ONE | {"channel": "nccl", "decode_pipeline": "on"}, None),
    ],
)
def test_ranks_of_either_side(given: dict[str, Any], message: str | None) -> None:
    if message is not None:
        with pytest.raises(ValueError, match=message):
            Config(**given)
        return
    config = Config(**given)
    for role in ROLES:  # what its processes are started with is taken, too, and means the same
        own = Config.model_validate_json(of_role(config, role).model_dump_json(exclude_unset=True))
        assert own.tensor_parallel_size == num_ranks(config, role)
        assert [num_ranks(own, each) for each in ROLES] == [num_ranks(config, each) for each in ROLES]


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_switches_are_what_a_yaml_file_says(word: str) -> None:
    """YAML takes on and off for booleans."""
    for setting in ("sm_partition", "decode_pipeline"):
        given = yaml.safe_load(f"{{mode: colocated, {setting}: {word}}}")
        assert getattr(Config(**given), setting) == word
    with pytest.raises(ValueError, match="'auto', 'on' or 'off'"):
        Config(mode="colocated", sm_partition=1)
