"""What it costs one sender's puts that another one, which writes into the same pool, is killed in the midst of it."""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple

from pdray.bench.peer_process import PeerProcess
from pdray.bench.pool_spec import PoolSpec
from pdray.bench.transfer_peers import ReceivingPeer, SendingPeer

START_TIMEOUT_S = 120.0
VICTIM_BLOCKS, BLOCKS = 256, 16  # of a put
BESIDE_S, KILLED_AFTER_S, AFTER_S = 1.0, 1.0, 4.0


class Death(NamedTuple):
    """Attributes:
    alone_ms, beside_ms: median put, with the other sender idle, and while it sends all the time.
    worst_ms: the longest put while that one is killed. num_after: puts after its death.
    """

    way: str
    alone_ms: float
    beside_ms: float
    worst_ms: float
    num_after: int

    @property
    def extra_ms(self) -> float:
        """Delay of the put that suffered most."""
        return self.worst_ms - self.beside_ms


def measure_death(spec: PoolSpec, environments: list[dict[str, str]]) -> Death:
    """Three processes: a receiver, and two senders that share the other GPU where there are two.

    Args:
        spec: of at least VICTIM_BLOCKS blocks. environments: of the victim, the other sender, and the receiver.
    """
    with contextlib.ExitStack() as stack:

        def start(factory: type, name: str, environment: dict[str, str]) -> PeerProcess:
            peer = PeerProcess(factory, spec._replace(name=name), environment=environment)
            stack.callback(peer.stop)
            return peer

        victim = start(SendingPeer, "victim", environments[0])
        other = start(SendingPeer, "other", environments[1])
        receiver = start(ReceivingPeer, spec.name, environments[2])
        port = receiver.call("start", timeout_s=START_TIMEOUT_S)
        for sender, name in ((victim, "victim"), (other, "other")):
            sender.call("describe", timeout_s=START_TIMEOUT_S)
            sender.call("connect", spec.name, port, 1, receiver.call("accept", name, 1))
        blocks = list(range(1, VICTIM_BLOCKS + 1))
        receiver.call("aim", blocks)
        other.call("send", blocks[:BLOCKS], 0.0, 1)
        alone = other.call("send", blocks[:BLOCKS], BESIDE_S, 1)
        victim.post("send", blocks, BESIDE_S + 2 * KILLED_AFTER_S + AFTER_S, 4)
        beside = other.call("send", blocks[:BLOCKS], BESIDE_S, 1)
        other.post("send", blocks[:BLOCKS], KILLED_AFTER_S + AFTER_S, 1)
        time.sleep(KILLED_AFTER_S)
        victim.kill()
        around = other.result("send", timeout_s=START_TIMEOUT_S)
        after = other.call("send", blocks[:BLOCKS], 0.2, 1)
    return Death(
        way=spec.kind,
        alone_ms=1e3 * alone.latency_s,
        beside_ms=1e3 * beside.latency_s,
        worst_ms=1e3 * around.worst_s,
        num_after=after.num_puts,
    )


def format_death(death: Death) -> str:
    return (
        f"a sender killed while it sends, {death.way}: another one's puts of {BLOCKS} blocks took "
        f"{death.alone_ms:.2f} ms alone, {death.beside_ms:.2f} ms beside it, {death.worst_ms:.2f} ms at worst: "
        f"{death.extra_ms:.2f} ms more; {death.num_after} puts since"
    )
