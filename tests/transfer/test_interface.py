"""Which interface NCCL is told to use."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from pdray.transfer.nccl import interface
from pdray.transfer.nccl.interface import VARIABLE, interface_of, use_interface_of

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["192.168.7.3", "fe80::1%eth0"],
    "eth01": ["10.1.2.3", "fd00::7"],
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: [SimpleNamespace(address=each) for each in own] for name, own in INTERFACES.items()}
    monkeypatch.setattr(interface.psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(os, "environ", {})


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("10.1.2.3", "eth01"),
        ("192.168.7.3", "eth0"),
        ("fd00::7", "eth01"),
        ("127.0.0.1", None),
        ("::1", None),
        ("localhost", None),
        ("10.1.2.4", None),
        ("", None),
    ],
)
def test_the_interface_that_has_the_workers_address(host: str, name: str | None) -> None:
    assert interface_of(host) == name
    assert use_interface_of(host) == os.environ.get(VARIABLE, "") == ("" if name is None else f"={name}")


def test_a_choice_of_the_environment_stands() -> None:
    os.environ[VARIABLE] = "docker"
    assert use_interface_of("10.1.2.3") == os.environ[VARIABLE] == "docker"


def test_a_name_that_nobody_knows_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def unknown(host: str, port: None) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(interface.socket, "getaddrinfo", unknown)
    assert use_interface_of("nowhere.example") == "" and "nowhere.example is no host here" in caplog.text
