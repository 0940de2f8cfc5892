"""Joining a running Ray cluster, or starting one that ends with this process."""

from __future__ import annotations

import logging
import os
import secrets
from typing import Any

import ray

from pdray.errors import PdrayError
from pdray.interrupts import interrupts_held


def join(address: str | None) -> None:
    """Join a running cluster: the one named, RAY_ADDRESS's, or this machine's.

    Raises:
        PdrayError: there is none.
    """
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise PdrayError(f"no Ray cluster to join at {address or 'this machine'}: {error}") from error


def start_local(**options: Any) -> None:
    """Start a cluster of this process's own.

    Ray gives such a cluster token authentication and, without a token, writes a new one to ~/.ray; from then on every
    `ray start` on this machine would ask for it too. So the token is made here, for this process's life.

    Args:
        options: of ray.init().
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    with interrupts_held():
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **options)


def join_or_start(address: str | None) -> None:
    """Join a running cluster, or start one if none is named and none runs; "local" always starts one."""
    if address != "local":
        try:
            return join(address)
        except PdrayError:
            if address is not None:
                raise
    start_local()
