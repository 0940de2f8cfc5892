"""A Ray cluster of several nodes on one machine: each has a raylet and an object store of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.cluster_utils import Cluster


@contextmanager
def simulated_nodes(
    num_nodes: int, cpus_of_each: int, system_config: dict[str, Any] | None = None
) -> Iterator[Cluster]:
    """A head without CPUs, and so many nodes that workers can lie on; this process is connected to it meanwhile."""
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": system_config or {}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=cpus_of_each)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
