"""What a configuration becomes on a device."""

from __future__ import annotations

import pickle

import pytest

from pdray.config import Config


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
