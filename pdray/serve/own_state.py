"""What Serve says of the replica that runs here."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client  # what `serve status` uses; there is no public name for it

from pdray.control.silent_routers import RouterProcess

ANSWER_TIMEOUT_S = 5.0


async def is_stopping() -> bool:
    """Whether Serve has begun to stop this replica. False while Serve does not answer."""
    context = serve.get_replica_context()
    client: Any = _get_global_client()
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            details = await client._controller.get_serve_instance_details.remote()
    except (RayError, TimeoutError):
        return False
    application = details["applications"].get(context.app_name, {})
    deployment = application.get("deployments", {}).get(context.deployment, {})
    states = {replica["replica_id"]: replica["state"] for replica in deployment.get("replicas", ())}
    return str(getattr(state := states.get(context.replica_tag), "value", state)) == "STOPPING"


def own_process() -> RouterProcess:
    """The process of the replica that runs here."""
    context = ray.get_runtime_context()
    replica_id = serve.get_replica_context().replica_tag
    return RouterProcess(replica_id, context.get_actor_id() or "", os.getpid(), context.get_node_id())
