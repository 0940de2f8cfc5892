"""Where workers listen, what their peers dial, and who may connect."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from pdray.actors import placement
from pdray.actors.placement import ListenAddress, OneNode, listen_address
from pdray.config import Config
from pdray.wire.peers import PeerName, Role
from pdray.wire.server import SessionServer


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> str:
    """A node of a Ray cluster, by its address."""
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(placement.ray.util, "get_node_ip_address", lambda: "10.1.2.3")
    return "10.1.2.3"


@pytest.mark.parametrize(
    ("host", "bind", "dial"),
    [
        ("", "10.1.2.3", "10.1.2.3"),
        ("0.0.0.0", "0.0.0.0", "10.1.2.3"),
        ("::", "::", "10.1.2.3"),
        ("192.168.0.7", "192.168.0.7", "192.168.0.7"),
        ("worker.example", "worker.example", "worker.example"),
    ],
)
def test_peers_dial_an_address_that_can_be_dialled(node: str, host: str, bind: str, dial: str) -> None:
    assert listen_address(Config(host=host)) == ListenAddress(bind, dial)


def test_without_ray_it_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: False)
    assert listen_address(Config()) == ListenAddress("127.0.0.1", "127.0.0.1")


async def test_others_may_connect_once_the_cluster_has_grown(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True}, {"Alive": False}]
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)
    door = OneNode(Config(), listen_address(Config()))
    assert [await door.admits(peer) for peer in (node, "127.0.0.1", "::1", "10.9.9.9")] == [True, True, True, False]
    nodes.append({"Alive": True})
    assert await door.admits("10.9.9.9")
    chosen = Config(host="0.0.0.0")
    assert await OneNode(chosen, listen_address(chosen)).admits("10.9.9.9")


@pytest.mark.parametrize("admitted", [True, False])
async def test_who_is_sent_away_is_not_listened_to(admitted: bool) -> None:
    async def admits(peer: str) -> bool:
        assert peer == "127.0.0.1"
        return admitted

    server = SessionServer(PeerName("decode-0", "1", Role.DECODE), b"secret", None, timeout_s=5, admits=admits)  # type: ignore[arg-type]
    port = await server.start("127.0.0.1")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\x00\x00\x00\x04none")
    with contextlib.suppress(ConnectionError):
        answer = await reader.read()
        assert bool(answer) == admitted  # one who may come in hears why the handshake failed
    writer.close()
    await server.stop()
