"""When this process's connection to Ray ends: with its last user, and only if it was opened for them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pdray import ray_hold
from pdray.errors import ConfigError
from pdray.ray_hold import hold_ray


class FakeRay:
    """Ray's part that matters here."""

    def __init__(self) -> None:
        self.session: str | None = None
        self.opened: list[str | None] = []

    def open(self, address: str | None) -> bool:
        self.opened.append(address)
        self.session = address or f"10.0.0.1:{len(self.opened)}"
        return True

    def is_initialized(self) -> bool:
        return self.session is not None

    def shutdown(self) -> None:
        self.session = None

    def get_runtime_context(self) -> SimpleNamespace:
        assert self.session is not None
        return SimpleNamespace(gcs_address=self.session)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray_hold, "ray", fake)
    monkeypatch.setattr(ray_hold, "join_or_start", fake.open)
    monkeypatch.setattr(ray_hold, "_holds", set())
    return fake


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_last_user_ends_it(fake: FakeRay, order: tuple[int, int]) -> None:
    holds = [hold_ray(None), hold_ray(None)]
    assert fake.opened == [None]
    holds[order[0]].release()
    holds[order[0]].release()
    assert fake.is_initialized()
    holds[order[1]].release()
    assert not fake.is_initialized()


def test_the_drivers_own_connection_stays(fake: FakeRay) -> None:
    fake.open("10.0.0.9:1")
    first, second = hold_ray(None), hold_ray("10.0.0.9:1")
    first.release()
    second.release()
    assert fake.session == "10.0.0.9:1"


def test_a_connection_that_the_driver_opened_meanwhile_stays(fake: FakeRay) -> None:
    hold = hold_ray(None)
    fake.shutdown()
    fake.open("10.0.0.9:1")
    later = hold_ray(None)
    hold.release()
    later.release()
    assert fake.session == "10.0.0.9:1"


def test_one_process_has_one_cluster(fake: FakeRay) -> None:
    first = hold_ray("10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.2:6379.*connected to Ray at 10\.0\.0\.1:6379"):
        hold_ray("10.0.0.2:6379")
    second = hold_ray("10.0.0.1:6379")
    first.release()
    second.release()
    assert not fake.is_initialized()
