"""What a rank other than 0 does of its worker's nccl channels: it carries out rank 0's orders."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from pdray.background import start_thread
from pdray.transfer.channel import FinishAnswer, Site
from pdray.transfer.nccl.communicator import Transport
from pdray.transfer.nccl.rank_orders import (
    CloseSends,
    GiveUp,
    OpenReceives,
    OpenSends,
    RankFacts,
    ReceiveBlocks,
    SendBlocks,
    SetPatience,
    SetUp,
    StopReceiving,
    decode_order,
    encode,
    unpack_ids,
)
from pdray.transfer.nccl.rank_receives import RankReceives
from pdray.transfer.nccl.rank_sends import RankSends
from pdray.transfer.nccl.staging import Staging


class RankPart:
    """Orders are begun on a thread of their own, beside the steps; none of them makes it wait for a peer.

    Args:
        set_up: makes this rank's stagings, for SetUp; returns the largest piece that fits all of them.
        stagings_of: gives those that a peer's channels have, of every epoch; "": those of a decode worker.
    """

    def __init__(
        self,
        site: Site,
        transport: Transport,
        set_up: Callable[[SetUp], int | None],
        stagings_of: Callable[[str], list[Staging]],
    ) -> None:
        self._site = site
        self._transport = transport
        self._set_up = set_up
        self._stagings_of = stagings_of
        self._sends: dict[int, RankSends] = {}  # by link
        self._receives: RankReceives | None = None

    def begin(self, payload: bytes) -> FinishAnswer:
        """See Kind.begin_answer()."""
        answer = b""
        match decode_order(payload):
            case SetUp() as order:
                answer = encode(RankFacts(self._transport.gpu, self._set_up(order)))
            case OpenSends() as order:
                timeout_s = self._site.config.worker_timeout_s
                sends = RankSends(order, self._stagings_of(order.peer), self._transport, timeout_s)
                self._sends[order.link] = sends
                return sends.finish_opening
            case SendBlocks() as order:
                return self._sends[order.link].send(range(order.first_layer, order.last_layer), unpack_ids(order.ids))
            case CloseSends(link) if link in self._sends:
                return beside("nccl-close", self._closing(link))
            case OpenReceives() as order:
                return self._receiving().open(order)
            case ReceiveBlocks() as order:
                layers = range(order.first_layer, order.last_layer)
                return self._receiving().receive(order.link, layers, unpack_ids(order.ids))
            case SetPatience() as order:
                self._receiving().set_patience(order)
            case GiveUp() as order:
                receives = self._receiving()
                return beside("nccl-give-up", lambda: receives.give_up(order))
            case StopReceiving() if self._receives is not None:
                return beside("nccl-stop", self._receives.stop)
        return lambda: answer

    def _receiving(self) -> RankReceives:
        if self._receives is None:
            site = self._site
            self._receives = RankReceives(
                self._stagings_of(""),
                self._transport,
                name=site.worker_id,
                timeout_s=site.config.worker_timeout_s,
                on_fatal=site.on_fatal,
            )
        return self._receives

    def _closing(self, link: int) -> Callable[[], None]:
        close = self._sends[link].begin_closing()

        def work() -> None:
            close()
            self._sends.pop(link, None)

        return work


def beside(name: str, work: Callable[[], None]) -> FinishAnswer:
    """Do this on a thread of its own; answered when it is done."""
    done: Future[bytes] = Future()

    def run() -> None:
        work()
        done.set_result(b"")

    start_thread(name, run, done.set_exception)
    return lambda: done.result() if done.done() else None
