"""Who is at the two ends of a session: the one home of a process's name and role."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Role(StrEnum):
    """What a process does for requests. BOTH is a worker that prefills and decodes ("colocated")."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class PeerName(NamedTuple):
    """Attributes:
    incarnation: changes with every process that takes the id.
    role: what it says it is; the handshake proves it with the name, and refuses one that it does not know.
    """

    id: str
    incarnation: str
    role: Role
