"""Where worker actors go: names, resources, lifetime, environment."""

from __future__ import annotations

from typing import Any

import ray

from pdray.config import Config

NAMESPACE = "pdray"


def uses_cuda(config: Config) -> bool:
    """Whether workers run on GPUs: as configured, or because the cluster has some."""
    if config.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.device == "cuda"


def worker_options(config: Config, app_name: str, worker_id: str, *, detached: bool) -> dict[str, Any]:
    """Options for one worker's `ray.remote(...)`: readable name, fractional resources, own threads.

    A detached worker is named in pdray's namespace, so that a Coordinator that starts anew finds it.
    Ray gives a process with num_cpus < 1 a single OpenMP thread, hence OMP_NUM_THREADS.
    """
    share = config.prefill_num_gpus if worker_id.startswith("prefill") else config.decode_num_gpus
    options: dict[str, Any] = {
        "name": f"{app_name}:{worker_id}",
        "namespace": NAMESPACE,
        "num_cpus": config.worker_num_cpus,
        "num_gpus": share if uses_cuda(config) else 0,
        "max_restarts": 0,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(config.num_threads), "TOKENIZERS_PARALLELISM": "false"}},
    }
    if detached:
        options["lifetime"] = "detached"
    return options
