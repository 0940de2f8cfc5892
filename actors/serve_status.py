"""Questions to Serve about an application."""

from __future__ import annotations

from ray.exceptions import ActorDiedError

SERVE_TIMEOUT_S = 10.0


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
