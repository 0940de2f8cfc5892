"""What pure control code asks its owner to do. Effects are returned in the order to perform them."""

from __future__ import annotations

from typing import NamedTuple

from pdray.cluster.messages import AnyMessage, LegKey


class Send(NamedTuple):
    """Send a message to a peer by its id. A peer without a session is gone: drop it."""

    to: str
    message: AnyMessage


class StartCompute(NamedTuple):
    """Give the leg to the prefill engine."""

    key: LegKey


class FlushPuts(NamedTuple):
    """Issue the leg's puts that were held back, then call puts_flushed()."""

    key: LegKey


class Release(NamedTuple):
    """Stop computing the leg and unpin its blocks: no put of it is in flight."""

    key: LegKey


LedgerEffect = Send | StartCompute | FlushPuts | Release
