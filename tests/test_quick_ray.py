"""A cluster for one driver: what Ray starts for it, and with what. The tests of actors run on one."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray._private.node
import ray._private.parameter
import ray._private.services
from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD, PROCESS_TYPE_RAYLET

from pdray import quick_ray
from pdray.quick_ray import AGENT_PORTS, FIRST_PORT, free_ports, quick_start

NODE_ID = "ab" * 28


def parts() -> list[Any]:
    services: Any = ray._private.services
    node: Any = ray._private.node.Node
    return [ray._private.parameter.RayParams, node.start_api_server, services.start_ray_process, services.get_node]


def test_everything_of_rays_is_put_back() -> None:
    before = parts()
    with quick_start():
        assert not any(now is then for now, then in zip(parts(), before, strict=True))
    assert parts() == before
    with pytest.raises(ConnectionError), quick_start():
        raise ConnectionError
    assert parts() == before


def test_another_ray_starts_in_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_ray, "_raylet", SimpleNamespace(__name__="_raylet", GcsClient=None))
    before = parts()
    assert "_raylet.persist_port" in str(quick_ray._unknown_parts())
    with quick_start():
        assert parts() == before


@pytest.mark.parametrize("given", [{}, {"metrics_export_port": 21_234}])
def test_a_raylet_knows_its_agents_ports_before_they_run(
    given: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def start(command: list[str], process_type: str, fate_share: bool, **_: object) -> None:
        started.append(command)

    monkeypatch.setattr(ray._private.services, "start_ray_process", start)
    flags = [f"--node_id={NODE_ID}", f"--session_dir={tmp_path}"]
    services: Any = ray._private.services
    with quick_start():
        params: Any = ray._private.parameter.RayParams(**given)
        for num_cpus in (16, 4, 1):
            command = ["raylet", *flags, f"--num_prestart_python_workers={num_cpus}"]
            services.start_ray_process(command, PROCESS_TYPE_RAYLET, True, stdout_file=None)
        services.start_ray_process(["gcs"], "gcs_server", fate_share=True)
    assert [command[-1].partition("=")[2] for command in started] == ["3", "2", "1", ""]
    assert started[0][:-1] == ["raylet", *flags] and started[-1] == ["gcs"]
    assert params.no_monitor and params.include_log_monitor is False
    ports = {name: int((tmp_path / f"{name}_{NODE_ID}").read_text()) for name in AGENT_PORTS}
    assert ports == {name: getattr(params, name) for name in AGENT_PORTS}
    assert len(set(ports.values())) == len(ports) and given.items() <= ports.items()


def test_without_an_api_server_its_address_is_that_of_nobody() -> None:
    """Agents that find none write an error into their logs every second."""
    put: list[tuple[object, ...]] = []
    node: Any = SimpleNamespace(get_gcs_client=lambda: SimpleNamespace(internal_kv_put=lambda *a: put.append(a)))
    with quick_start():
        ray._private.node.Node.start_api_server(node, include_dashboard=False, raise_on_failure=False)
    assert node._webui_url == ""
    assert put == [(DASHBOARD_ADDRESS.encode(), b"127.0.0.1:0", True, KV_NAMESPACE_DASHBOARD)]


def test_the_driver_goes_on_when_its_node_has_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    class Client:
        def __init__(self, address: str) -> None:
            assert address == "1.2.3.4:5"

        def get_all_node_info(self) -> dict[bytes, None]:
            looks.append("looks")
            return {bytes.fromhex(NODE_ID): None} if len(looks) == 3 else {b"other": None}

    def get_node(gcs_address: str, node_id: str) -> str:
        looks.append(f"gets {node_id}")
        return "the node"

    monkeypatch.setattr(quick_ray, "_raylet", SimpleNamespace(GcsClient=Client))
    assert quick_ray._get_node(get_node, "1.2.3.4:5", NODE_ID) == "the node"
    assert looks == ["looks", "looks", "looks", f"gets {NODE_ID}"]


def test_ports_are_free_and_not_of_those_that_the_system_gives_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "range"
    monkeypatch.setattr(quick_ray, "PORT_RANGE_FILE", file)
    assert free_ports(1) is None, "nobody knows which"
    file.write_text(f"{FIRST_PORT + 2000}\t60999\n")
    ports = free_ports(4)
    assert ports is not None and len(set(ports)) == 4
    assert all(FIRST_PORT <= port < FIRST_PORT + 2000 for port in ports)
    file.write_text("1024 65535")
    assert free_ports(1) is None, "it gives them all away"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        monkeypatch.setattr(quick_ray, "FIRST_PORT", ports[0])
        file.write_text(f"{ports[0] + 1} 60999")
        assert free_ports(1) is None
