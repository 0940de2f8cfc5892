"""The router's state machine by itself: what it may know, which way its calls point, and that no effect is lost."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pdray import router as package
from pdray.config import Config
from pdray.control.effects import Send
from pdray.errors import QueueFullError
from pdray.outputs import SampledToken
from pdray.router.effects import BecameReady, Connect, Disconnect, Ended, Granted, Progress, TickAt
from pdray.router.machine import RECONNECT_S, RouterMachine
from pdray.router.request import Request
from pdray.sampling_params import SamplingParams
from pdray.wire.cluster_view import ClusterView, Draining, WorkerInfo
from pdray.wire.lease_messages import Credit, CreditUpdate, LeaseGranted, LeaseRequest, LegTokens, Tokens
from pdray.wire.peers import Role

# From the bottom to the top; none knows those above it.
LAYERS = [
    *("leg", "request", "link", "effects", "workers", "drain", "placement", "replay", "dispatch", "probe", "requests"),
    *("machine", "routed", "connections", "router"),
]
PURE = LAYERS[: LAYERS.index("machine") + 1]
IMPURE = {"asyncio", "time", "random", "threading", "socket"}
CREDIT = Credit(free_blocks=100, free_places=8, running=0, waiting=0, leases=0)
WORKER = WorkerInfo("decode-0", "1", Role.BOTH, "", 0, 0, "", "", "", 200, 16, 100, 8, 64)


def imports_of(layer: str) -> set[str]:
    """Modules that are imported to run; not those for type checkers alone."""
    tree = ast.parse((Path(package.__path__[0]) / f"{layer}.py").read_text())
    nodes = [node for node in tree.body if not isinstance(node, ast.If)]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return names


@pytest.mark.parametrize("layer", PURE)
def test_what_decides_knows_no_clock_and_no_loop(layer: str) -> None:
    assert not {name.split(".")[0] for name in imports_of(layer)} & IMPURE


@pytest.mark.parametrize("layer", LAYERS)
def test_calls_point_one_way(layer: str) -> None:
    above = {f"pdray.router.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]}
    assert not imports_of(layer) & above


def connected(**config: int) -> RouterMachine:
    """A machine with one worker that does both, and its credit."""
    machine = RouterMachine(Config(mode="colocated", skip_tokenizer_init=True, **config), "router-0")  # type: ignore[arg-type]
    assert machine.view(0.0, ClusterView(1, [WORKER], [])) == [Connect(WORKER, 0.0)]
    assert not machine.ready
    assert [effect.to for effect in machine.opened("decode-0", "1") if isinstance(effect, Send)] == ["decode-0"]
    assert machine.received(0.0, "decode-0", CreditUpdate(CREDIT)) == [BecameReady()]
    return machine


def request_of(name: str, max_tokens: int = 4) -> Request:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return Request(name, None, [1, 2, 3], params, 0, None, 0.0)


def begun(machine: RouterMachine, name: str) -> Request:
    request = request_of(name)
    [ask] = machine.submit(0.0, request)
    assert isinstance(ask, Send) and isinstance(ask.message, LeaseRequest)
    assert machine.received(1.0, "decode-0", LeaseGranted(name, 0, 0, CREDIT)) == [Granted(request)]
    return request


def told(name: str, position: int, finish: str | None = None) -> LegTokens:
    return LegTokens(name, 0, [SampledToken(0, position, 7, None, finish)])


def test_what_an_event_has_decided_before_it_raised_is_not_lost() -> None:
    """A worker that skips a position has broken the protocol; what it said of others before stands."""
    machine = connected()
    good, bad = begun(machine, "good"), begun(machine, "bad")
    with pytest.raises(AssertionError, match="position 5 after 0 tokens"):
        machine.received(2.0, "decode-0", Tokens([told("good", 0, "stop"), told("bad", 5)], CREDIT))
    effects = machine.closed(3.0, "decode-0", "internal error")
    assert effects[:2] == [Progress(good), Ended(good, None)] and Connect(WORKER, RECONNECT_S) in effects
    assert good.ended and not bad.ended and list(machine.requests) == ["bad"] and machine.queue_depth == 1


def test_a_request_that_is_not_taken_leaves_nothing() -> None:
    machine = connected(max_queue_size=0)
    machine.received(0.0, "decode-0", CreditUpdate(Credit(0, 0, 8, 0, 8)))
    with pytest.raises(QueueFullError):
        machine.submit(0.0, request_of("r"))
    assert not machine.requests and not machine.queue_depth and machine.tick(1.0) == []


def test_the_clock_is_the_callers() -> None:
    """A lost leg is tried again at once, then after a rest that ends when the caller says so."""
    machine = connected()
    request = begun(machine, "r")
    for number, incarnation in enumerate(("2", "3")):
        worker = WorkerInfo("decode-0", incarnation, Role.BOTH, "", 0, 0, "", "", "", 200, 16, 100, 8, 64)
        effects = machine.view(10.0, ClusterView(2 + number, [worker], []))
        assert effects[0] == Disconnect("decode-0")
        waking = [effect.at for effect in effects if isinstance(effect, TickAt)]
        assert bool(waking) == bool(number) and all(at > 10.0 for at in waking)
        machine.opened("decode-0", incarnation)
        effects = machine.received(10.0, "decode-0", CreditUpdate(CREDIT))
        assert [isinstance(effect, Send) for effect in effects] == ([] if number else [True])
        if not number:
            machine.received(10.0, "decode-0", LeaseGranted("r", 1, 0, CREDIT))
    assert machine.tick(waking[0] - 1e-6) == []
    [ask] = machine.tick(waking[0])
    assert isinstance(ask, Send) and ask.message.key == ("r", 2)  # type: ignore[union-attr]
    assert not request.ended


def test_a_drain_ends_what_outlasts_it_once() -> None:
    machine = connected()
    request = begun(machine, "r")
    news = ClusterView(2, [WORKER], [], draining=Draining("a newer one comes", 5.0))
    assert machine.view(10.0, news) == [TickAt(15.0)] and not machine.ready
    assert machine.view(12.0, news) == []  # a later deadline changes nothing
    assert machine.tick(14.9) == []
    ended = [effect for effect in machine.tick(15.0) if isinstance(effect, Ended)]
    assert [(each.request, str(each.error)) for each in ended] == [
        (request, "the answer was cut short: a newer one comes")
    ]
    assert machine.tick(16.0) == []
    machine.view(17.0, ClusterView(3, [WORKER], []))
    assert machine.ready
