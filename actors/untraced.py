"""An actor's methods that no other process calls, without what Ray puts around every method of an actor's class."""

from __future__ import annotations

import inspect

TRACING = "ray.util.tracing.tracing_helper"


def without_tracing(cls: type) -> None:
    """Take Ray's tracing off a class's plain methods; async ones, which other processes call, keep it.

    Ray wraps every method for its traces, whoever calls it, and also where nothing is traced. That doubles the cost of
    a call, and some are made for each token.
    """
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        is_wrapped = method.__globals__.get("__name__") == TRACING
        if is_wrapped and not name.startswith("__") and not inspect.iscoroutinefunction(method):
            setattr(cls, name, inspect.unwrap(method))
