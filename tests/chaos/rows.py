"""What a test reports."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        figure: what was measured.
        limit: what must hold.
        ok: whether it does.
    """

    name: str
    figure: str
    limit: str
    ok: bool
