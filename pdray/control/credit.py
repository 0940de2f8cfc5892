"""Routers that wait for a decode worker's credit, and what each of them waits for.

A router that cannot place its next request says with RenewLeases what that needs. The worker tells it as soon as its
credit covers that, and not before. Both sides judge by covers() and by the same Demand, so a
lease is asked for only when the worker, as far as it has told, would grant it.

Pure and single-threaded.
"""

from __future__ import annotations

from pdray.control.effects import Send
from pdray.wire.lease_messages import Credit, CreditUpdate, CreditWanted


def covers(credit: Credit, blocks: int, places: int) -> bool:
    """Whether a lease of so many blocks and places would be granted."""
    return credit.free_blocks >= blocks and credit.free_places >= places


class CreditWaiters:
    """The credit that each router waits for, until it was told that it is there."""

    def __init__(self) -> None:
        self._wanted: dict[str, CreditWanted] = {}

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def renewed(self, router_id: str, wanted: CreditWanted | None, credit: Credit) -> Send:
        """A router's RenewLeases: it waits for this now, and for nothing else. Returns the answer."""
        if wanted is None or covers(credit, wanted.blocks, wanted.places):
            self._wanted.pop(router_id, None)
        else:
            self._wanted[router_id] = wanted
        return Send(router_id, CreditUpdate(credit))

    def router_gone(self, router_id: str) -> None:
        self._wanted.pop(router_id, None)

    def announce(self, credit: Credit) -> list[Send]:
        """Tell those whose wait is over. To be called after whatever may have raised the credit."""
        ready = [router for router, wanted in self._wanted.items() if covers(credit, wanted.blocks, wanted.places)]
        for router_id in ready:
            del self._wanted[router_id]
        return [Send(router_id, CreditUpdate(credit)) for router_id in ready]
