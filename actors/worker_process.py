"""A worker's process as the Coordinator knows it, and how its actor is created."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from pdray.actors.placement import NAMESPACE, origin
from pdray.actors.process_death import end_actor
from pdray.actors.questions import ask, within
from pdray.config import Config
from pdray.control.effects import Start
from pdray.control.membership import Stray
from pdray.errors import PdrayError
from pdray.wire.cluster_view import WorkerIdentity, WorkerInfo, WorkerLoading

logger = logging.getLogger(__name__)

CREATE_TIMEOUT_S = 60.0  # Ray itself waits as long for its GCS


@dataclass(slots=True)
class WorkerProcess:
    """One incarnation of a worker.

    Attributes:
        creation: of its actor, where that was here; what it raised, if it came to nothing.
        actor: None until it is created, and of a process that only others know.
        info: None until it has started.
    """

    worker_id: str
    incarnation: str
    creation: asyncio.Task[ActorHandle | Exception] | None = None
    actor: ActorHandle | None = None
    info: WorkerInfo | None = None


async def create_actor(
    cls: type, options: dict[str, Any], config: Config, start: Start, secret: bytes, app_name: str
) -> ActorHandle | Exception:
    """The worker's actor, which has not loaded anything yet; or what kept it from coming to be."""

    def create() -> ActorHandle:
        actor_class: Any = ray.remote(cls)
        arguments = (config, start.worker_id, start.incarnation, secret)
        guest = {} if start.lender is None else {"lender": start.lender}
        handle: ActorHandle = actor_class.options(**options).remote(*arguments, app_name=app_name, **guest)
        return handle

    try:
        return await ask(create, what=f"to start {start.worker_id}", timeout_s=CREATE_TIMEOUT_S)
    except ValueError as error:  # the name is taken, by an actor that the table does not know
        logger.warning("%s: ending whoever is called %s: %s", app_name, options["name"], error)
        try:
            await end_actor(await ask(partial(ray.get_actor, options["name"], namespace=NAMESPACE), what="a name"))
        except (ValueError, RayError, PdrayError) as another:
            return another
        return error
    except (RayError, PdrayError) as error:
        return error


async def find_worker(
    config: Config, app_name: str, worker_id: str, name: str, secret: bytes
) -> tuple[WorkerIdentity | WorkerLoading | Stray, ActorHandle] | None:
    """The actor of this name, and whether the Coordinator can go on with it; None if there is none.

    Raises:
        NoAnswerError: Ray does not say.
    """
    actor: Any
    try:
        actor = await ask(partial(ray.get_actor, name, namespace=NAMESPACE), what="who has a name")
    except ValueError:
        return None
    identity: WorkerIdentity | WorkerLoading | None = None
    try:
        identity = await within(actor.identify.remote(), config.worker_timeout_s)
    except (RayError, TimeoutError) as error:
        logger.warning("%s: %s does not answer: %r", app_name, worker_id, error)
    if identity is not None and identity.origin == origin(config, secret):
        return identity, actor
    logger.warning("%s: ending %s, which a former Coordinator left behind", app_name, name)
    return Stray(worker_id, f"{worker_id} of a former Coordinator"), actor
