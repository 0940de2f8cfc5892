"""Whether the cluster's processes can import what they are to run."""

from __future__ import annotations

import ray
from ray.exceptions import RayTaskError

from pdray.actors.answer import answer_of
from pdray.actors.placement import OUTSIDE_PLACEMENT_GROUPS


async def why_not_importable(module: str = "pdray") -> str | None:
    """The remedy if a process of the cluster cannot import the module; None if it can.

    Ray pickles an actor's class by its name: where that cannot be imported, the actor only ever dies.
    """

    def probe() -> str:  # inside a function, so that it is pickled itself and not its name
        import importlib

        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    task = ray.remote(probe).options(num_cpus=0, max_retries=0, scheduling_strategy=OUTSIDE_PLACEMENT_GROUPS)
    try:
        problem: str = await answer_of(task.remote())
    except RayTaskError as error:
        problem = str(error)
    if not problem:
        return None
    return (
        f"the processes of Ray's cluster cannot import {module} ({problem}): install it on every node, in the "
        "environment that `ray start` runs in, or start the driver with a runtime_env that brings it "
        '(ray.init(runtime_env={"pip": [...]}) or "py_modules")'
    )
