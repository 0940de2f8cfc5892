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
    assert on_gpu.model_dump(exclude={"max_num_seqs", "max_num_batched_tokens"}) == config.model_dump(
        exclude={"max_num_seqs", "max_num_batched_tokens"}
    )
