"""`pdray serve`: an application that lives as long as the command."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import uuid
from typing import NoReturn

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from pdray.cluster_commands import stop_applications
from pdray.config import Config
from pdray.errors import PdrayError
from pdray.health import wait_until_ready
from pdray.interrupts import interrupts_ignored
from pdray.options import option_name
from pdray.ray_cluster import join_or_start
from pdray.reachable import ClusterEndedError, is_reachable, while_reachable
from pdray.serve_applications import ServeApplication, applications, brief, require_http, serve_state

POLL_INTERVAL_S = 0.5
STOP_TIMEOUT_S = 60.0  # beyond the time for which requests may go on
LEAVE_S = 2.0  # for the process that has ended the last application to leave the cluster
DELETE_TIMEOUT_S = 60.0
ROUTE_PREFIX = "/"


def serve(
    config: Config,
    *,
    name: str,
    host: str,
    port: int,
    address: str | None,
    replace: bool = False,
    num_routers: int = 1,
) -> int:
    """Deploy the application, wait until it answers, and keep it until Ctrl-C or SIGTERM.

    Ends everything that it started: the application, and Ray if it was not running before. Returns 1 if the
    application was deleted or replaced from elsewhere; the replacement stays, and so does this process while the Ray
    that it started is in use.

    Args:
        replace: take the place of an application of pdray's with the same name.
        num_routers: replicas that answer HTTP requests, each with a queue of its own.

    Raises:
        PdrayError: the port, the name or the route is taken, the deployment failed, or was not ready within
            start_timeout_s.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = config.with_absolute_paths()
    deployment = Deployment(name, num_routers)
    owns_ray, cluster = False, None
    try:
        owns_ray = join_or_start(address, shared=True, before_start=lambda: require_port(host, port))
        address_of_gcs = str(ray.get_runtime_context().gcs_address)
        cluster = address_of_gcs if is_reachable(address_of_gcs) else None  # not through Ray Client
        require_http(host, port)
        require_name(name, replace=replace)
        start_http(host, port)
        print(f"Loading {config.model} ...", flush=True)
        deployment.deploy(config)
        url = f"http://{'127.0.0.1' if host in ('', '0.0.0.0', '::') else host}:{port}"
        wait_until_ready(
            url,
            config.start_timeout_s,
            setting=option_name("start_timeout_s"),
            on_reason=_print_reason,
            check=deployment.why_not_running,
        )
        print(f"{config.model_name} is served at {url}/v1; Ctrl-C stops it", flush=True)
        deployment.watch()
    except KeyboardInterrupt:
        print("Stopping ...", file=sys.stderr, flush=True)
        return 0
    except DisplacedError as error:
        print(f"pdray serve: {error}", file=sys.stderr, flush=True)
        if owns_ray:
            _stay_for_others()
        return 1
    except (RayError, RayServeException) as error:
        raise PdrayError(f"Ray's cluster has failed: {brief(str(error))}") from error
    finally:
        with interrupts_ignored():
            try:
                if ray.is_initialized():
                    _end(deployment, cluster)
            finally:
                ray.shutdown()


class DisplacedError(PdrayError):
    """The application was deleted or replaced by another user or process."""


def _stay_for_others() -> None:
    """Returns once nothing is left in the Ray that this process has started, or at Ctrl-C."""
    from pdray.actors.client import list_applications

    if others := [each.name for each in applications().values() if each.status != "DELETING"]:
        print(f"This process has started Ray, and stays for {', '.join(others)}; Ctrl-C ends all", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        while applications() or list_applications():
            time.sleep(POLL_INTERVAL_S)
        time.sleep(LEAVE_S)


def _end(deployment: Deployment, cluster: str | None) -> None:
    """End the deployment. Where the cluster is ending too, as when a signal went to all processes of a group, nothing
    is left to do, and this process ends at once.

    Args:
        cluster: address of the cluster, if it can be asked.
    """
    try:
        while_reachable(cluster, deployment.end)
    except ClusterEndedError as error:
        print(f"pdray serve: {error}, too", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(0)  # ray.shutdown() would hang; processes that were started here die with this one


class Deployment:
    """An application deployed by this process, told apart from others of the same name."""

    def __init__(self, name: str, num_routers: int = 1) -> None:
        self.name = name
        self.num_routers = num_routers
        self.id = uuid.uuid4().hex
        self._former: str | None = None  # whose it was before

    def deploy(self, config: Config) -> None:
        """Hand it to Serve, which goes on by itself.

        Raises:
            PdrayError: Serve refuses it.
        """
        from pdray.serve.app import build

        former = applications().get(self.name)
        self._former = None if former is None else former.deployed_by
        application = build(config, deployed_by=self.id, num_routers=self.num_routers)
        target = ray_serve.RunTarget(application, name=self.name, route_prefix=ROUTE_PREFIX)
        try:
            ray_serve.run_many(
                [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
            )
        except (RuntimeError, RayServeException) as error:
            raise PdrayError(f"application {self.name!r} could not be deployed: {brief(str(error))}") from error

    def is_there(self) -> bool:
        """Whether it is in Serve, and still this process's."""
        found = applications().get(self.name)
        return found is not None and found.deployed_by == self.id

    def end(self) -> None:
        """Delete it from the cluster, if it is there and still this process's.

        Raises:
            PdrayError: it is still there after STOP_TIMEOUT_S.
        """
        try:
            if self.is_there():
                stop_applications(self.name, STOP_TIMEOUT_S)
        except (RayError, RayServeException) as error:
            print(f"pdray serve: Ray has ended before {self.name!r}: {brief(str(error))}", file=sys.stderr, flush=True)

    def why_not_running(self) -> str | None:
        """The reason why it does not run yet, or None. A former application of the name may still answer until it runs.

        Raises:
            DisplacedError: another one has taken its place. PdrayError: its deployment has failed.
        """
        found = applications().get(self.name)
        if found is None or found.deployed_by not in (None, self._former, self.id):
            raise self._displaced(found)
        if found.deployed_by == self.id and found.status == "DEPLOY_FAILED":
            raise PdrayError(f"application {self.name!r} could not be deployed: {found.message}")
        if found.deployed_by == self.id and found.status == "RUNNING":
            return None
        return f"application {self.name!r} is {found.status}: {found.message}".rstrip(": ")

    def watch(self) -> NoReturn:
        """Print Serve's status of it whenever that changes.

        Raises:
            DisplacedError: in the end.
        """
        shown = "RUNNING"
        while True:
            found = applications().get(self.name)
            if found is None or found.deployed_by != self.id:
                raise self._displaced(found)
            if found.status != shown:
                shown = found.status
                print(
                    f"application {self.name!r} is {shown}: {found.message}".rstrip(": "), file=sys.stderr, flush=True
                )
            time.sleep(POLL_INTERVAL_S)

    def _displaced(self, found: ServeApplication | None) -> DisplacedError:
        how = "deleted" if found is None or found.status == "DELETING" else "replaced"
        return DisplacedError(f"application {self.name!r} was {how} by somebody else")


def require_name(name: str, *, replace: bool) -> None:
    """Neither name nor route is another application's. One that is being deleted is waited for.

    Raises:
        PdrayError: one is; with what to do.
    """
    deadline = time.monotonic() + DELETE_TIMEOUT_S
    while (found := applications().get(name)) is not None and found.status == "DELETING":
        if time.monotonic() > deadline:
            raise PdrayError(f"application {name!r} is being deleted, and still there after {DELETE_TIMEOUT_S:g} s")
        time.sleep(POLL_INTERVAL_S)
    if found is not None and not found.is_pdrays:
        raise PdrayError(f"Serve has an application {name!r} that is not pdray's; choose another --name")
    if found is not None and not replace:
        raise PdrayError(
            f"application {name!r} is there already ({found.status}): --replace puts this one in its place, "
            f"`pdray stop --name {name}` ends it"
        )
    for other in applications().values():
        if other.name != name and other.route_prefix == ROUTE_PREFIX:
            end = f"`pdray stop --name {other.name}` ends it" if other.is_pdrays else "it is not pdray's"
            raise PdrayError(
                f"route {ROUTE_PREFIX} of Ray Serve in this cluster is application {other.name!r}'s ({end}); "
                "--address local and another --port start a Ray cluster and a Serve of their own"
            )


def start_http(host: str, port: int) -> None:
    """Start Serve with its HTTP server, unless it runs already.

    Raises:
        PdrayError: the address is in use, or is not this machine's.
    """
    if serve_state() is not None:
        return
    require_port(host, port)
    try:
        ray_serve.start(http_options={"host": host, "port": port})
    except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
        raise PdrayError(f"Ray Serve could not listen on {host}:{port}: {brief(str(error))}") from error


def require_port(host: str, port: int) -> None:
    """Raises:
    PdrayError: the address is in use, or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PdrayError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from error


def _print_reason(reason: str) -> None:
    if not reason.startswith("HTTP 404"):  # Serve has not come to the application yet
        print(f"waiting: {reason}", flush=True)
