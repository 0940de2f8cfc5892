"""What the table tells of errors; everything else it does is in the models of the protocol and of supervision."""

from __future__ import annotations

from pdray.control.effects import Start
from pdray.control.membership import Membership
from pdray.wire.cluster_view import WorkerInfo


def start(table: Membership, now: float) -> str:
    """The worker is started; returns its incarnation."""
    (effect,) = table.tick(now)
    assert isinstance(effect, Start)
    return effect.incarnation


def load(table: Membership, incarnation: str) -> None:
    table.ready(WorkerInfo("decode-0", incarnation, "both", "", 0, 0, "", "", "", 8, 16, 1024, 8, 64))
    table.tick(0.0)


def lose(table: Membership, now: float, incarnation: str) -> None:
    table.suspect("decode-0", incarnation)
    table.tick(now)
    table.died(now, "decode-0", incarnation)


def test_an_error_is_told_until_all_has_started() -> None:
    table = Membership(0, 1, 1.0)
    first = start(table, 0.0)
    table.start_failed("decode-0", first, "no memory")
    lose(table, 0.0, first)
    assert table.view.error == "decode-0 did not start: no memory"
    second = start(table, 2.0)
    assert table.view.error is not None
    load(table, second)
    assert table.view.error is None
    lose(table, 3.0, second)
    assert table.view.error is None, "that one has started"
