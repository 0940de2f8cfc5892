"""Questions to Serve about an application."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ray.exceptions import ActorDiedError, RayError

from pdray.actors.questions import ask
from pdray.control.wanted import Wanted
from pdray.errors import PdrayError

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 2.0
SERVE_TIMEOUT_S = 10.0
SERVE_NAMESPACE = "serve"  # of the replicas' actors


def is_listed(app_name: str) -> bool:
    """Whether Serve has an application of that name; False if Serve itself has been shut down.

    Blocks, for as long as Serve's controller does not answer, and at first for the second or two that importing Serve
    takes.

    Raises:
        RayError: the controller does not answer now: it is being started again.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return app_name in serve.status().applications
    except (ActorDiedError, RayServeException):  # it has ended for good
        return False


async def keep_asking(app_name: str, wanted: Wanted) -> None:
    """Ask for ever whether Serve still has the application. No answer is none: only ``wanted`` draws conclusions."""
    while True:
        await asyncio.sleep(CHECK_INTERVAL_S)
        try:
            listed = await ask(lambda: is_listed(app_name), what="Serve's applications", timeout_s=SERVE_TIMEOUT_S)
        except (RayError, PdrayError) as error:
            logger.warning("%s: Serve cannot be asked: %s", app_name, error)
        else:
            wanted.serve_answered(time.monotonic(), is_listed=listed)


def replica_actor_name(app_name: str, replica_id: str) -> str | None:
    """Name of the actor of one of the application's replicas, also of one that Serve stops; None if it has none such.

    Blocks as is_listed().

    Raises:
        RayError: the controller does not answer now.
    """
    from ray.serve.context import _get_global_client  # what `serve status` uses; there is no public name for it

    client: Any = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    application = client.get_serve_details()["applications"].get(app_name, {})
    for deployment in application.get("deployments", {}).values():
        for replica in deployment["replicas"]:
            if replica["replica_id"] == replica_id:
                name: str = replica["actor_name"]
                return name
    return None
