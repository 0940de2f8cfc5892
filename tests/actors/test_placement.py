"""The options of a worker's actor."""

from __future__ import annotations

import pytest

from pdray.actors.placement import worker_options
from pdray.config import Config


@pytest.mark.parametrize(
    "settings, environment",
    [
        ({}, None),  # and so a process that Ray has ready
        ({"num_threads": 4}, {"OMP_NUM_THREADS": "4"}),
        ({"worker_num_cpus": 3.0}, {"OMP_NUM_THREADS": "1"}),
        ({"worker_env": {"NAME": "of {worker_id}"}}, {"NAME": "of decode-0"}),
        ({"device": "cuda", "num_threads": 4}, None),
    ],
)
def test_a_worker_has_an_environment_of_its_own_only_where_it_needs_one(
    settings: dict[str, object], environment: dict[str, str] | None
) -> None:
    config = Config.model_validate({"device": "cpu"} | settings)
    options = worker_options(config, "app", "decode-0", detached=False)
    assert options.get("runtime_env") == (None if environment is None else {"env_vars": environment})
    assert options["num_cpus"] == config.worker_num_cpus and options["name"].endswith(":decode-0")
