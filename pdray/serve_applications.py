"""What Ray Serve says of its applications: which are pdray's, how they are, and where Serve listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.serve.context import _get_global_client
from ray.serve.schema import ServeInstanceDetails

from pdray.errors import PdrayError
from pdray.serve import MARK

IMPORT_PREFIX = "pdray."
ANY_HOST = ("", "0.0.0.0", "::")
MAX_MESSAGE_CHARS = 1000


@dataclass(frozen=True, slots=True)
class ServeApplication:
    """Attributes:
    status: Serve's word: DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING, ...
    message: why, as Serve tells it; may be empty.
    is_pdrays: it was made by pdray.serve.build; False for other people's applications.
    deployed_by: id of the `pdray serve` that has deployed it; "" for other ways, None before Serve knows.
    grace_s: its requests may go on for so long once it is deleted.
    """

    name: str
    status: str
    message: str
    route_prefix: str | None
    is_pdrays: bool
    deployed_by: str | None
    grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ServeState:
    """Serve in the cluster that this process is connected to."""

    host: str
    port: int
    has_http: bool
    applications: dict[str, ServeApplication]


def serve_state() -> ServeState | None:
    """None if Serve does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    details = ServeInstanceDetails(**client.get_serve_details())
    http = client.http_config
    applications = {name: _application(name, each) for name, each in details.applications.items()}
    has_http = str(getattr(details.proxy_location, "value", details.proxy_location)) != "Disabled"
    return ServeState(str(http.host or ""), int(http.port), has_http, applications)


def applications() -> dict[str, ServeApplication]:
    """All of Serve's, by name."""
    state = serve_state()
    return {} if state is None else state.applications


def _application(name: str, details: Any) -> ServeApplication:
    marks = [each.deployment_config.user_config for each in details.deployments.values()]
    mark = next((mark for mark in marks if isinstance(mark, dict) and MARK in mark), None)
    config = details.deployed_app_config
    imported = config is not None and str(config.import_path).startswith(IMPORT_PREFIX)
    messages = [details.message, *(each.message for each in details.deployments.values())]
    return ServeApplication(
        name,
        details.status.value,
        brief("\n".join(message for message in messages if message)),
        details.route_prefix,
        mark is not None or imported,
        mark[MARK] if mark is not None else "" if details.deployments else None,
        max((_grace_s(each) for each in details.deployments.values()), default=0.0),
    )


def _grace_s(deployment: Any) -> float:
    return float(deployment.deployment_config.graceful_shutdown_timeout_s)


def brief(message: str) -> str:
    """A message without its traceback: Serve's first line, and what the exception says."""
    lines = [line.rstrip() for line in message.strip().splitlines() if "For further information visit" not in line]
    if not any("Traceback" in line for line in lines):
        return " ".join(line.strip() for line in lines)[:MAX_MESSAGE_CHARS]
    start = next(number for number, line in enumerate(lines) if "Traceback" in line)
    last_frame = max(number for number, line in enumerate(lines) if line.lstrip().startswith('File "'))
    said = [line.strip() for line in lines[last_frame + 1 :] if line.strip()]
    # The frame's source line comes first; the exception begins with its class.
    said = said[next((n for n, line in enumerate(said) if line.split(":")[0].isidentifier() or "Error" in line), 0) :]
    return " ".join([*(line.strip() for line in lines[:start]), *said])[:MAX_MESSAGE_CHARS]


def require_http(host: str, port: int) -> None:
    """Serve, if it runs already, listens where a new application is to be asked; a cluster has one Serve.

    Raises:
        PdrayError: it listens elsewhere, or not at all; with what to do.
    """
    state = serve_state()
    if state is None:
        return
    if not state.has_http:
        raise PdrayError(
            "Ray Serve runs in this cluster without HTTP (its proxy_location is Disabled); `serve shutdown` ends "
            "it and all of its applications, and --address local starts a Ray cluster beside it"
        )
    if state.port != port or (state.host not in ANY_HOST and host != state.host):
        others = ", ".join(state.applications) or "none"
        here = f"--port {state.port}" + ("" if state.host in ANY_HOST else f" --host {state.host}")
        raise PdrayError(
            f"Ray Serve listens on {state.host}:{state.port} in this cluster already, not on {host}:{port}, and a "
            f"cluster has one Serve (its applications: {others}): use {here}, or --address local for "
            "a Ray cluster of its own"
        )
