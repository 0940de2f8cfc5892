"""What `pdray serve`, `stop` and `status` make of what they find in a cluster: theirs, others', or nothing."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pdray import cluster_commands, reachable, serve_command
from pdray.cluster_commands import cluster_status, format_status, stop_applications
from pdray.config import Config
from pdray.errors import PdrayError
from pdray.serve_applications import ServeApplication
from pdray.serve_command import Deployment, DisplacedError, require_name, require_port
from pdray.testing.patience import PATIENCE_S


def application(name: str, status: str = "RUNNING", **changes: Any) -> ServeApplication:
    fields: dict[str, Any] = {"message": "", "route_prefix": "/", "is_pdrays": True, "deployed_by": ""}
    return ServeApplication(name, status, **(fields | changes))


class Cluster:
    """Serve's applications and pdray's Coordinators."""

    def __init__(self) -> None:
        self.deployed: dict[str, ServeApplication] = {}
        self.coordinators: list[str] = []
        self.deleted: list[str] = []
        self.stuck: set[str] = set()

    def put(self, *applications: ServeApplication) -> None:
        self.deployed = {each.name: each for each in applications}
        self.coordinators = [each.name for each in applications if each.is_pdrays and each.status == "RUNNING"]

    def delete(self, name: str, _blocking: bool = True) -> None:
        self.deleted.append(name)
        if name not in self.stuck:
            del self.deployed[name]

    def stop(self, name: str) -> None:
        self.coordinators.remove(name)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    from pdray.actors import client

    fake = Cluster()
    for module in (cluster_commands, serve_command):
        monkeypatch.setattr(module, "applications", lambda: dict(fake.deployed))
    monkeypatch.setattr(cluster_commands.ray_serve, "delete", fake.delete)
    monkeypatch.setattr(client, "list_applications", lambda: list(fake.coordinators))
    monkeypatch.setattr(client, "stop_application", fake.stop)
    monkeypatch.setattr(client, "describe", lambda name: {"model": "m", "mode": "colocated", "state": "not ready"})
    monkeypatch.setattr(serve_command, "DELETE_TIMEOUT_S", 0.0)
    return fake


FOREIGN = application("hello", is_pdrays=False, route_prefix="/hello")


def test_stop_ends_only_pdrays(cluster: Cluster) -> None:
    failed = application("typo", "DEPLOY_FAILED")
    cluster.put(application("one"), FOREIGN, failed)
    assert stop_applications(None, 5.0) == ["one", "typo"]
    assert sorted(cluster.deleted) == ["one", "typo"] and list(cluster.deployed) == ["hello"]


@pytest.mark.parametrize(("name", "problem"), [("hello", "is not pdray's"), ("nosuch", "does not exist")])
def test_stop_of_anything_else_is_an_error(cluster: Cluster, name: str, problem: str) -> None:
    cluster.put(application("one"), application("two"), FOREIGN)
    with pytest.raises(PdrayError, match=f"'{name}' {problem}; pdray's are: one, two"):
        stop_applications(name, 5.0)
    assert not cluster.deleted


def test_what_serve_does_not_let_go_is_told_and_its_workers_end(cluster: Cluster) -> None:
    cluster.put(application("one"), application("two"))
    cluster.stuck = {"one"}
    with pytest.raises(PdrayError, match="^one: still there after 0 s"):
        stop_applications(None, 0.0)
    assert cluster.coordinators == [] and list(cluster.deployed) == ["one"]


def test_stop_waits_for_requests_that_may_go_on(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve lets the application go at the third look, long after a timeout of nothing."""
    cluster.put(application("one", grace_s=PATIENCE_S), application("two"))
    cluster.stuck = {"one"}
    looks = iter(range(3))

    def look() -> dict[str, ServeApplication]:
        if next(looks, None) is None:
            cluster.deployed.pop("one", None)
        return dict(cluster.deployed)

    monkeypatch.setattr(cluster_commands, "applications", look)
    assert stop_applications(None, 0.0) == ["one", "two"]
    assert cluster.deployed == {} and cluster.coordinators == []


def test_stop_takes_an_application_that_only_its_coordinator_knows(cluster: Cluster) -> None:
    cluster.coordinators = ["left"]
    assert stop_applications("left", 5.0) == ["left"] and not cluster.coordinators


def test_status_tells_what_serve_says_of_a_failed_deployment(cluster: Cluster) -> None:
    cluster.put(
        application("typo", "DEPLOY_FAILED", message="num_decode_wrokers: Extra inputs are not permitted"),
        FOREIGN,
    )
    (state,) = cluster_status()
    assert state["state"] == "DEPLOY_FAILED"
    shown = format_status([state])
    assert "typo DEPLOY_FAILED" in shown and "num_decode_wrokers: Extra inputs" in shown


def test_status_tells_it_beside_a_coordinator_too(cluster: Cluster) -> None:
    cluster.put(application("one", "UNHEALTHY", message="the router's replica keeps failing"))
    cluster.coordinators = ["one"]
    (state,) = cluster_status()
    assert state["error"] == "the router's replica keeps failing" and state["model"] == "m"


@pytest.mark.parametrize(
    ("present", "name", "replace", "message"),
    [
        (application("pdray"), "pdray", False, r"there already \(RUNNING\): --replace .* `pdray stop --name pdray`"),
        (application("pdray", "DEPLOY_FAILED"), "pdray", False, r"there already \(DEPLOY_FAILED\)"),
        (FOREIGN, "hello", False, "not pdray's; choose another --name"),
        (FOREIGN, "hello", True, "not pdray's; choose another --name"),
        (application("one"), "two", False, "route / .* 'one''s .`pdray stop --name one`.*--address local"),
        (application("x", is_pdrays=False), "two", True, "route / .* 'x''s .it is not pdray's"),
        (application("pdray", "DELETING"), "pdray", True, "is being deleted, and still there"),
    ],
)
def test_a_name_or_route_that_is_taken(
    cluster: Cluster, present: ServeApplication, name: str, replace: bool, message: str
) -> None:
    cluster.put(present)
    with pytest.raises(PdrayError, match=message):
        require_name(name, replace=replace)


def test_a_name_that_is_free_or_is_to_be_replaced(cluster: Cluster) -> None:
    require_name("pdray", replace=False)
    cluster.put(application("pdray"), FOREIGN)
    require_name("pdray", replace=True)


def test_a_port_in_use_is_told_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PdrayError, match="in use; choose another --port"):
            require_port("127.0.0.1", other.getsockname()[1])
    with pytest.raises(PdrayError, match="cannot listen on 192.0.2.1:8000: .*--host"):
        require_port("192.0.2.1", 8000)


@pytest.mark.parametrize(
    ("there", "how"),
    [
        ([], "deleted"),
        ([application("pdray", "DELETING", deployed_by=None)], "deleted"),
        ([application("pdray", deployed_by="another")], "replaced"),
        ([application("pdray", deployed_by="")], "replaced"),
    ],
)
def test_serving_ends_when_the_application_is_anothers(
    cluster: Cluster, there: list[ServeApplication], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = Deployment("pdray")
    statuses = ["RUNNING", "UNHEALTHY", "RUNNING"]

    def step(_seconds: float) -> None:
        cluster.put(*([application("pdray", statuses.pop(), deployed_by=deployment.id)] if statuses else there))

    cluster.put(application("pdray", deployed_by=deployment.id))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_command, "time", SimpleNamespace(sleep=step))
        with pytest.raises(DisplacedError, match=f"application 'pdray' was {how} by somebody else"):
            deployment.watch()
    assert "'pdray' is UNHEALTHY" in capsys.readouterr().err
    assert not deployment.is_there()


def test_a_replaced_application_answers_until_the_new_one_runs(cluster: Cluster) -> None:
    deployment = Deployment("pdray")
    deployment._former = "former"
    steps: list[tuple[ServeApplication, Callable[[str | None], bool]]] = [
        (application("pdray", "DEPLOY_FAILED", deployed_by="former"), lambda reason: "DEPLOY_FAILED" in str(reason)),
        (application("pdray", "RUNNING", deployed_by="former"), lambda reason: reason is not None),
        (application("pdray", "DEPLOYING", deployed_by=deployment.id), lambda reason: reason is not None),
        (application("pdray", "RUNNING", deployed_by=deployment.id), lambda reason: reason is None),
    ]
    for present, is_right in steps:
        cluster.put(present)
        assert is_right(deployment.why_not_running()), present
    cluster.put(application("pdray", "DEPLOY_FAILED", deployed_by=deployment.id, message="no such model"))
    with pytest.raises(PdrayError, match="could not be deployed: no such model"):
        deployment.why_not_running()
    cluster.put(application("pdray", deployed_by="a third"))
    with pytest.raises(DisplacedError, match="was replaced by somebody else"):
        deployment.why_not_running()


def test_as_many_routers_as_wanted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[Any] = []
    monkeypatch.setattr(serve_command.ray_serve, "run_many", lambda given, **_: targets.extend(given))
    Deployment("pdray").deploy(Config())
    Deployment("pdray", 3).deploy(Config())
    assert [target.target._bound_deployment.num_replicas for target in targets] == [1, 3]


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_an_end_tells_what_went_wrong(address: str | None, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachable, "is_reachable", lambda address: True)
    monkeypatch.setattr(serve_command, "STOP_TIMEOUT_S", 0.0)
    deployment = Deployment("pdray")
    cluster.put(application("pdray", deployed_by=deployment.id))
    cluster.stuck = {"pdray"}
    with pytest.raises(PdrayError, match="pdray: still there"):
        serve_command._end(deployment, address)
    cluster.stuck = set()
    serve_command._end(deployment, address)
    assert cluster.deployed == {}


def test_a_cluster_that_ends_with_this_process_is_not_waited_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal to a whole group ends Ray's processes first; each call to them would take a minute."""

    class Ended(BaseException):
        pass

    def leave(status: int) -> None:
        raise Ended(status)

    never = threading.Event()
    monkeypatch.setattr(Deployment, "end", lambda self: never.wait(60))
    monkeypatch.setattr(reachable, "is_reachable", lambda address: address != "10.0.0.1:6379")
    monkeypatch.setattr(serve_command, "os", SimpleNamespace(_exit=leave))
    with pytest.raises(Ended, match="0"):
        serve_command._end(Deployment("pdray"), "10.0.0.1:6379")
    never.set()
    assert "has ended" in capsys.readouterr().err


@pytest.mark.parametrize("before_it_ran", [True, False])
@pytest.mark.parametrize("owns_ray", [True, False])
def test_who_has_started_ray_stays_for_what_took_the_place(
    before_it_ran: bool,
    owns_ray: bool,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its end would end the cluster under the other application."""
    events: list[str] = []

    def sleep(_seconds: float) -> None:
        events.append("waited")
        cluster.put()

    def wait(*_: object, check: Callable[[], str | None], **__: object) -> None:
        if not before_it_ran:
            cluster.put(application("pdray", deployed_by=ids[0]))
        check()
        cluster.put(application("pdray", deployed_by="another"))

    def deploy(self: Deployment, _config: Config) -> None:
        ids.append(self.id)
        cluster.put(application("pdray", deployed_by="another"))

    ids: list[str] = []
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    fake_ray = SimpleNamespace(
        is_initialized=lambda: True, get_runtime_context=lambda: context, shutdown=lambda: events.append("shutdown")
    )
    monkeypatch.setattr(serve_command, "ray", fake_ray)
    monkeypatch.setattr(serve_command, "join_or_start", lambda *_, **__: owns_ray)
    for name in ("require_http", "require_name", "start_http"):
        monkeypatch.setattr(serve_command, name, lambda *_, **__: None)
    monkeypatch.setattr(serve_command, "is_reachable", lambda address: True)
    monkeypatch.setattr(serve_command, "wait_until_ready", wait)
    monkeypatch.setattr(serve_command.time, "sleep", sleep)
    monkeypatch.setattr(Deployment, "deploy", deploy)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert serve_command.serve(Config(), name="pdray", host="127.0.0.1", port=8000, address=None) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert events == (["waited", "waited", "shutdown"] if owns_ray else ["shutdown"])
    assert "was replaced by somebody else" in capsys.readouterr().err and cluster.deleted == []


@pytest.mark.parametrize("ended", [True, False])
def test_stop_ends_with_the_cluster(
    ended: bool, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A `pdray serve` that has started Ray ends it when its application is gone."""

    class Left(BaseException):
        pass

    def leave(status: int) -> None:
        raise Left(status)

    hanging = threading.Event()
    answers = iter([True, False])
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(cluster_commands, "join", lambda address: None)
    monkeypatch.setattr(cluster_commands.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(cluster_commands, "os", SimpleNamespace(_exit=leave))
    monkeypatch.setattr(cluster_commands, "is_reachable", lambda address: next(answers))
    monkeypatch.setattr(reachable, "is_reachable", lambda address: next(answers))
    cluster.put(application("one"))
    if not ended:
        assert cluster_commands.stop(None, name="one", timeout_s=5.0) == 0
        assert capsys.readouterr().out == "stopped one\n"
        return
    monkeypatch.setattr(cluster_commands, "stop_applications", lambda *_: hanging.wait(60))
    with pytest.raises(Left, match="0"):
        cluster_commands.stop(None, name="one", timeout_s=5.0)
    hanging.set()
    assert capsys.readouterr().out.startswith("stopped one: Ray's cluster at 10.0.0.1:6379 has ended")
